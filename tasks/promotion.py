"""Is the challenger better than the champion? A paired comparison of their scores, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs.errors import UserError
from configs.retraining import PairedComparison, RetrainPolicy
from tasks.statistics import FEW_ROWS, difference_interval


def compare_rows(
    champion: tuple[str, Sequence[float]],
    challenger: tuple[str, Sequence[float]],
    policy: RetrainPolicy,
    trained_rows: int = 0,
) -> PairedComparison:
    """Compare two models, each with its name and its score (percent) on each row, the same rows in the same order.

    The challenger is promoted if its mean is better by the policy's margin at least and the interval of that
    difference lies above 0. Raises UserError if there are fewer than two rows.
    """
    (champion_name, old), (challenger_name, new) = champion, challenger
    if len(old) != len(new):
        raise ValueError(f"{len(old)} rows cannot be paired with {len(new)}")
    if len(old) < 2:
        raise UserError(
            "there are too few rows to compare two models on",
            field="evaluation_dataset",
            value=f"{len(old)} rows of {policy.evaluation_dataset}"
            + (f"; {trained_rows} more were trained on" if trained_rows else ""),
            expected="at least 2, better some hundred",
        )
    difference = math.fsum(new) / len(new) - math.fsum(old) / len(old)
    differences = [after - before for before, after in zip(old, new, strict=True)]
    low, high = difference_interval(old, new, policy.confidence, policy.seed)
    figures = {
        "champion": champion_name,
        "challenger": challenger_name,
        "metric": policy.metric,
        "rows": len(old),
        "trained_rows": trained_rows,
        "champion_mean": math.fsum(old) / len(old),
        "challenger_mean": math.fsum(new) / len(new),
        "difference": difference,
        "low": low,
        "high": high,
        "confidence": policy.confidence,
        "better": sum(each > 0 for each in differences),
        "worse": sum(each < 0 for each in differences),
        "ties": differences.count(0.0),
    }
    enough, certain = difference >= policy.margin, low > 0
    found = PairedComparison.model_validate({**figures, "promoted": enough and certain, "reason": ""})
    return found.model_copy(update={"reason": _reason(found, policy.margin, enough, certain)})


def _reason(found: PairedComparison, margin: float, enough: bool, certain: bool) -> str:
    if enough and certain:
        verdict = f"better by {margin:g} points or more, and the interval lies above 0"
    elif not enough:
        verdict = f"not better by the margin of {margin:g} points"
    else:
        verdict = "the interval reaches 0 or below, so the difference may be chance"
    few = f"; {found.rows} rows are few for an interval" if found.rows < FEW_ROWS else ""
    left_out = f"; {found.trained_rows} rows left out, they were trained on" if found.trained_rows else ""
    return (
        f"{verdict}: {found.metric} {found.challenger_mean:.2f} % against {found.champion_mean:.2f} % on {found.rows} "
        f"rows, {found.difference:+.2f} points, {100 * found.confidence:g} % interval "
        f"[{found.low:+.2f}, {found.high:+.2f}]{few}{left_out}"
    )

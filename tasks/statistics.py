"""How far a mean can be trusted, and whether one model is better than another on the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from configs.scoring import DEFAULT_CONFIDENCE, LOWER_IS_BETTER, Interval, PairedDifference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 9999
FEW_ROWS = 30
SEED = 42
_NUMBERS_AT_ONCE = 5_000_000  # of resampled rows: 40 MB
_RIGHT_OR_WRONG = frozenset({0.0, 100.0})


def mean_intervals(
    columns: Mapping[str, Sequence[float]], confidence: float = DEFAULT_CONFIDENCE, seed: int = SEED
) -> dict[str, Interval]:
    """The percentile bootstrap interval of the mean of each column; all columns have the same number of rows.

    Rows are drawn with replacement, `RESAMPLES` times, the same draws for every column. The values of a column are
    put in order first, so that the interval does not depend on the order of the rows. Empty for fewer than two rows.
    """
    rows = len(next(iter(columns.values()), ()))
    if rows < 2:
        return {}
    import numpy as np

    values = np.sort(np.array(list(columns.values()), dtype=float), axis=1)
    means = np.concatenate([draws @ values.T for draws in _draws(rows, seed)]) / rows
    ends = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T
    return {name: Interval(float(low), float(high)) for name, (low, high) in zip(columns, ends, strict=True)}


def _draws(rows: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each row was drawn in each of the resamples, some resamples at a time: (resamples, rows)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // rows)
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(float)


def difference_interval(first: Sequence[float], second: Sequence[float], confidence: float, seed: int) -> Interval:
    """Percentile interval of the mean difference (second - first) by a paired bootstrap over the rows.

    Rows are drawn with replacement, the same for both models, `RESAMPLES` times; the ends are the quantiles
    (1 ± confidence) / 2 of the mean differences. Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapter 13; for comparing systems on one test set: Koehn, EMNLP 2004.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    return mean_intervals({"difference": differences}, confidence, seed)["difference"]


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """The exact p of McNemar's test: could two models that are equally often right differ so on these rows?

    Of the rows on which just one is right, how many are the second's: a binomial test with one half, two-sided.
    Rows count as right if their value is not 0. 1 if there is no such row.
    """
    only_first = sum(bool(before) and not after for before, after in zip(first, second, strict=True))
    only_second = sum(bool(after) and not before for before, after in zip(first, second, strict=True))
    return sign_test(only_second, only_first)


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of so many wins and losses if both were equally likely; 1 if there are none."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def paired_difference(
    metric: str,
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = DEFAULT_CONFIDENCE,
    seed: int = SEED,
) -> PairedDifference:
    """Compare two models by one metric, each with its value (percent) on each row, the same rows in the same order.

    Raises ValueError if the rows are not equally many, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} rows cannot be paired with {len(second)}, or are too few")
    gains = [after - before for before, after in zip(first, second, strict=True)]
    if metric in LOWER_IS_BETTER:
        gains = [-gain for gain in gains]
    before, after = math.fsum(first) / len(first), math.fsum(second) / len(second)
    return PairedDifference(
        metric=metric,
        rows=len(first),
        first=before,
        second=after,
        difference=after - before,
        interval=difference_interval(first, second, confidence, seed),
        confidence=confidence,
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        mcnemar_p=mcnemar(first, second) if _RIGHT_OR_WRONG.issuperset((*first, *second)) else None,
    )

"""A train on one page: overview (every parameter and where it came from), evaluation, log.

Plain Markdown, so that the Prefect page draws it; the pictures are data addresses inside it. Everything that comes
from outside (answers, descriptions, log lines) is escaped: it is text, never markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.records import TrainRecord, TrainStatus
from configs.resolve import DEFAULT, ResolvedTrain, describe
from configs.scoring import DEFAULT_CONFIDENCE, SCORE_TITLES, PairedDifference, are_scores_of_answers, figure_title
from methods import contract
from tasks import pages
from tasks.evaluation import Evaluation, read_evaluation
from tasks.files import last_lines
from tasks.plots import draw_curves
from tasks.scored_files import compare_row_scores
from tasks.scoring import computed_with
from tasks.stages import EventTail

SAMPLES = 8
LOG_LINES = 60
_DPI = 75  # a picture of about 50 kB: the page fetches it with every artifact of the flow run


def train_report(record: TrainRecord, status: TrainStatus, folder: Path, links: Mapping[str, str]) -> str:
    """The page of a train as Markdown; `folder` is the train's own, `links` are addresses by their names."""
    parts = [f"# {pages.text(record.id)}", _summary(record, status, links), "## Overview", _parameters(record)]
    if status != "running":
        parts += ["## Evaluation", *_evaluation(record, folder), "## Log", _log(folder / "training")]
    return "\n\n".join(parts) + "\n"


# --- overview ----------------------------------------------------------------------------------------------


def _summary(record: TrainRecord, status: TrainStatus, links: Mapping[str, str]) -> str:
    rows = {
        "Status": f"{status}: {record.reason}" if record.reason else status,
        "Description": record.config.description,
        "Base model": record.base or record.config.base_model,
        "Code of the base model": _code(record),
        "Dataset": record.dataset or record.config.dataset,
        "Validation rows": record.validation_dataset,
        "Evaluation rows": record.evaluation_dataset,
        "Model": record.model,
        "GPUs": ", ".join(record.gpus),
        "Attempts": str(record.attempts) if record.attempts > 1 else None,
        "Training": record.stopped,
        **{_OUTCOMES.get(name, name): f"{value:.6g}" for name, value in record.outcome.items()},
    }
    table = pages.table(
        ("Train", pages.text(record.id)), [(name, pages.cell(value)) for name, value in rows.items() if value]
    )
    linked = " · ".join(f"[{name}]({address})" for name, address in links.items())
    warnings = [f"- Warning: {pages.text(warning)}" for warning in record.warnings]
    return "\n\n".join(filter(None, [table, linked, "\n".join(warnings)]))


def _code(record: TrainRecord) -> str | None:
    code = record.remote_code
    return None if code is None else f"{code.digest} ({', '.join(code.files)})"


_OUTCOMES = {"steps": "Steps", "seconds": "Seconds of training", "loss": "Mean training loss", "best_step": "Best step"}


def _parameters(record: TrainRecord) -> str:
    """What somebody has set, then, folded, the rest."""
    described = describe(ResolvedTrain(config=record.config, origins=record.origins))
    rows = [
        (name.removeprefix("hyperparameters."), pages.cell(value), pages.cell(origin))
        for name, value, origin in described
    ]
    columns = ("Parameter", "Value", "From")
    given = [row for row in rows if row[2] != DEFAULT]
    defaults = [row for row in rows if row[2] == DEFAULT]
    folded = f"<details><summary>{len(defaults)} parameters at their defaults</summary>"
    return "\n\n".join([pages.table(columns, given), folded, pages.table(columns, defaults), "</details>"])


# --- evaluation --------------------------------------------------------------------------------------------


def _evaluation(record: TrainRecord, folder: Path) -> list[str]:
    found = {which: evaluation for which in _WHICH if (evaluation := read_evaluation(folder, which)) is not None}
    parts = [
        _picture(folder / "training", record.id),
        _scores(record.evaluation, found),
        _figures(record.evaluation),
        *_slices(found),
        *_samples(found),
    ]
    if not record.evaluation:
        parts.append("No evaluation dataset was scored.")
    return [part for part in parts if part]


def _picture(folder: Path, title: str) -> str:
    events = EventTail(folder / contract.EVENTS_FILE).read()
    picture = folder / "curves_small.png"
    if not draw_curves(events, picture, title, dpi=_DPI):
        return "There is no curve yet: the training has not taken a step."
    return pages.picture(picture, "Curves of the training")


_WHICH = {"base": "Before (base model)", "tuned": "After (fine-tuned)"}


def _scores(evaluation: Mapping[str, Mapping[str, float]], found: Mapping[str, Evaluation]) -> str:
    """Percent, before and after, with the interval of the change where the answers to the rows are kept."""
    if not any(map(are_scores_of_answers, evaluation.values())):
        return ""
    which = [each for each in _WHICH if each in evaluation]
    both = len(which) == len(_WHICH)
    changes = _changes(found)
    rows = []
    for key, title in SCORE_TITLES.items():
        values = [evaluation[each][key] for each in which if key in evaluation[each]]
        if len(values) == len(which):
            change = [f"{values[1] - values[0]:+.2f}{_interval(changes.get(key))}"] if both else []
            rows.append((title, *(f"{value:.2f}" for value in values), *change))
    columns = ("Score in percent", *(_WHICH[each] for each in which), *(["Change"] if both else []))
    computed = next((f"\n\n{pages.text(computed_with(each.scores))}" for each in found.values()), "")
    return pages.table(columns, rows) + computed if rows else ""


def _figures(evaluation: Mapping[str, Mapping[str, float]]) -> str:
    """The method's own figures, before and after."""
    base, tuned = evaluation.get("base", {}), evaluation.get("tuned", {})
    names = [] if any(map(are_scores_of_answers, (base, tuned))) else list({**base, **tuned})
    shown = {name: [f"{each[name]:.4g}" if name in each else "" for each in (base, tuned)] for name in names}
    rows = [(pages.text(figure_title(name)), *values) for name, values in shown.items()]
    return pages.table(("Figure", *_WHICH.values()), rows) if rows else ""


def _changes(found: Mapping[str, Evaluation]) -> dict[str, PairedDifference]:
    """What training has changed, by metric; nothing if not both models were scored row by row."""
    rows = [found[which].row_scores for which in _WHICH if which in found]
    if len(rows) < len(_WHICH):
        return {}
    compared = compare_row_scores(rows[0], rows[1], DEFAULT_CONFIDENCE)
    return {each.metric: each for each in compared}


def _interval(found: PairedDifference | None) -> str:
    if found is None:
        return ""
    low, high = found.interval
    return f" ({100 * found.confidence:g} %: {low:+.2f} to {high:+.2f}, {found.verdict})"


def _slices(found: Mapping[str, Evaluation]) -> list[str]:
    """One table a column that the rows were scored by."""
    tables = []
    for column in next((list(each.scores.slices) for each in found.values()), []):
        parts = {which: each.scores.slices[column] for which, each in found.items() if column in each.scores.slices}
        names = [f"{SCORE_TITLES[figure]}, {_WHICH[which]}" for figure in _SLICED for which in parts]
        rows = []
        for value in next(iter(parts.values())):
            scored = [parts[which].get(value) for which in parts]
            told = [f"{getattr(each, figure):.2f}" if each else "" for figure in _SLICED for each in scored]
            rows.append((pages.cell(value), str(scored[0].rows if scored[0] else ""), *told))
        tables.append(pages.table((pages.cell(column), "Rows", *names), rows))
    return tables


_SLICED = ("accuracy", "f1", "rouge_l")


def _samples(found: Mapping[str, Evaluation]) -> list[str]:
    """The first rows with what was expected and what each model answered."""
    rows = next((found[which].predictions for which in ("tuned", "base") if which in found), [])[:SAMPLES]
    if not rows:
        return []
    table = []
    for index, row in enumerate(rows):
        kept = [found[which].predictions if which in found else [] for which in _WHICH]
        answers = [_answer(each[index]) if index < len(each) else "" for each in kept]
        table.append((pages.cell(row["prompt"]), pages.cell(row["reference"]), *answers))
    columns = ("Prompt", "Expected", "Base model's answer", "Fine-tuned answer")
    return [
        f"The first {len(rows)} evaluation rows (✓ as expected, ✗ not); all are among the run's files in MLflow.",
        pages.table(columns, table),
    ]


def _answer(row: Mapping[str, Any]) -> str:
    cut = " (cut at the limit)" if row["hit_limit"] else ""
    return f"{'✓' if row['exact'] else '✗'} {pages.cell(row['prediction'])}{cut}"


# --- log and text ------------------------------------------------------------------------------------------


def _log(folder: Path) -> str:
    text = last_lines(folder / contract.LOG_FILE, LOG_LINES)
    if not text.strip():
        return "The training has written no log."
    lines = text.split("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"The last {len(lines)} lines of the training:\n\n{fence}text\n" + "\n".join(lines) + f"\n{fence}"

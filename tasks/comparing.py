"""Trains side by side: what differs, what came out, which is better and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from configs.records import TrainRecord
from configs.scoring import DEFAULT_CONFIDENCE, LOWER_IS_BETTER, SCORE_TITLES, PairedDifference
from methods import contract
from tasks.evaluation import Evaluation, read_evaluation
from tasks.plots import curves_of, draw_overlaid
from tasks.scored_files import compare_row_scores
from tasks.stages import EventTail
from tasks.statistics import FEW_ROWS
from tasks.tracking import flatten
from tasks.trains import train_folder

_NOT_COMPARED = {"name", "description", "alerts"}
SAMPLES = 10


class Sample(BaseModel):
    """One evaluation row with the answer of each train's model; None where it has none."""

    row: int
    prompt: str
    reference: str
    answers: list[str | None]
    figures: list[float | None] = Field(description="Of the metric that was compared by, in percent.")


class Comparison(BaseModel):
    """Trains side by side: by parameter, version and figure, one value a train in their order."""

    trains: list[str]
    parameters: dict[str, list[Any]] = Field(description="Those that differ.")
    shared: dict[str, Any] = Field(default_factory=dict, description="The parameters that are the same.")
    versions: dict[str, list[str | None]] = Field(
        default_factory=dict, description="Of data, base model and code, and of every package that differs."
    )
    figures: dict[str, list[float | None]]
    metric: str
    differences: dict[str, list[PairedDifference]] = Field(
        default_factory=dict, description="Of each other train's model against the first's, by train."
    )
    not_compared: dict[str, str] = Field(
        default_factory=dict, description="Why there is no difference row by row, by train."
    )
    better: str | None = Field(default=None, description="The train whose model is better than the first's, and best.")
    verdicts: dict[str, str] = Field(
        default_factory=dict, description="Of each other train against the first, in words, by train."
    )
    verdict: str = Field(description="Which is better, in words.")
    samples: list[Sample] = Field(default_factory=list, description="The rows that differ most, then the first ones.")


def compare_trains(
    records: Sequence[TrainRecord],
    metric: str = "f1",
    evaluations: Mapping[str, Evaluation] | None = None,
    packages: Mapping[str, Mapping[str, str]] | None = None,
    validated: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """Parameters and versions that differ, every outcome and score, and the models compared by their answers.

    By train: `evaluations` are the kept answers of the tuned models, `packages` the installed ones, `validated` the
    last figures on the validation rows.
    """
    values = [_parameters(record) for record in records]
    names = sorted({name for each in values for name in each} - _NOT_COMPARED)
    columns = {name: [each.get(name) for each in values] for name in names}
    figures = [{**record.outcome, **scores_of(record), **(validated or {}).get(record.id, {})} for record in records]
    known = dict.fromkeys(name for each in figures for name in each)
    found = Comparison(
        trains=[record.id for record in records],
        parameters={name: column for name, column in columns.items() if _differ(column)},
        shared={name: column[0] for name, column in columns.items() if not _differ(column)},
        versions=_versions(records, packages or {}),
        figures={name: [each.get(name) for each in figures] for name in known},
        metric=metric,
        verdict="",
    )
    _compare_answers(found, records, evaluations or {})
    return found.model_copy(update=_verdict(found))


def compare_kept(records: Sequence[TrainRecord], metric: str = "f1") -> Comparison:
    """The same with the answers and the packages that the trains have kept in their folders."""
    folders = {record.id: train_folder(record.id) for record in records}
    events = _events(records)
    evaluations = {train: read_evaluation(folder, "tuned") for train, folder in folders.items()}
    return compare_trains(
        records,
        metric,
        {train: evaluation for train, evaluation in evaluations.items() if evaluation is not None},
        {train: _packages(folder / "training" / "environment.txt") for train, folder in folders.items()},
        {train: last_validated(each) for train, each in events.items()},
    )


def last_validated(events: list[dict[str, Any]]) -> dict[str, float]:
    """The last figures on the validation rows, by the names of their curves."""
    return {name: points[-1][1] for name, points in curves_of(events).items() if name.startswith("eval_")}


def draw_trains(records: Sequence[TrainRecord], picture: Path, dpi: int = 110) -> bool:
    """Draw the curves of the trains over each other; False, and no file, if they have none."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    return draw_overlaid(_events(records), picture, "Curves of the trains", dpi)


def _events(records: Sequence[TrainRecord]) -> dict[str, list[dict[str, Any]]]:
    files = {record.id: train_folder(record.id) / "training" / contract.EVENTS_FILE for record in records}
    return {train: EventTail(file).read() for train, file in files.items() if file.exists()}


def _differ(column: Sequence[Any]) -> bool:
    return any(value != column[0] for value in column)


def _parameters(record: TrainRecord) -> dict[str, Any]:
    versions = {
        field: getattr(record, field) or getattr(record.config, field)
        for field in ("dataset", "validation_dataset", "evaluation_dataset")
    }
    return {**flatten(record.config), **versions}


def _versions(records: Sequence[TrainRecord], packages: Mapping[str, Mapping[str, str]]) -> dict[str, list[str | None]]:
    told: dict[str, list[str | None]] = {
        "dataset": [record.dataset for record in records],
        "validation rows": [record.validation_dataset for record in records],
        "evaluation rows": [record.evaluation_dataset for record in records],
        "base model": [record.base for record in records],
        "code": [record.code_version for record in records],
    }
    told = {name: column for name, column in told.items() if any(value is not None for value in column)}
    installed = [packages.get(record.id, {}) for record in records]
    if all(installed):
        for name in sorted({name for each in installed for name in each}):
            column = [each.get(name) for each in installed]
            if _differ(column):
                told[f"package {name}"] = column
    return told


def _packages(file: Path) -> dict[str, str]:
    """Name and version of each installed package, as `tasks.trains.environment_lock` has written them."""
    if not file.exists():
        return {}
    pairs = (line.partition("==") for line in file.read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in pairs if version}


def scores_of(record: TrainRecord) -> dict[str, float]:
    """Every score of a train by the model it is of, `base` or `tuned`, and its name."""
    return {f"{which} {name}": value for which, each in record.evaluation.items() for name, value in each.items()}


# --- answers -----------------------------------------------------------------------------------------------


def _compare_answers(found: Comparison, records: Sequence[TrainRecord], evaluations: Mapping[str, Evaluation]) -> None:
    first = evaluations.get(records[0].id)
    for record in records[1:]:
        other = evaluations.get(record.id)
        reason = _why_not(first, other)
        if reason is not None or first is None or other is None:
            found.not_compared[record.id] = reason or ""
            continue
        compared = compare_row_scores(first.row_scores, other.row_scores, DEFAULT_CONFIDENCE)
        if compared:
            found.differences[record.id] = compared
        else:
            found.not_compared[record.id] = "fewer than two rows were answered by both"
    found.samples.extend(_samples(found, [evaluations.get(record.id) for record in records]))


def _why_not(first: Evaluation | None, other: Evaluation | None) -> str | None:
    if first is None or other is None:
        which = "the first one's" if first is None else "its"
        return f"{which} answers to evaluation rows are not kept: it was given none, or has not come so far"
    if first.dataset != other.dataset:
        return f"it was scored on other rows ({other.dataset}) than the first one ({first.dataset})"
    if not (first.row_scores and other.row_scores):
        return "scores of single rows are not kept"
    return None


def _samples(found: Comparison, evaluations: Sequence[Evaluation | None]) -> list[Sample]:
    """The rows that the trains' models differ on most, by the metric, and the first rows where they do not differ."""
    told = [each for each in evaluations if each is not None]
    if not told or len({each.dataset for each in told}) > 1:
        return []
    rows: dict[int, Sample] = {}
    for index, evaluation in enumerate(evaluations):
        if evaluation is None:
            continue
        for row, scores in zip(evaluation.predictions, evaluation.row_scores, strict=False):
            none: list[Any] = [None] * len(evaluations)
            empty = Sample(
                row=scores.row, prompt=row["prompt"], reference=row["reference"], answers=none, figures=[*none]
            )
            sample = rows.setdefault(scores.row, empty)
            sample.answers[index] = row["prediction"]
            sample.figures[index] = getattr(scores, found.metric)
    return sorted(rows.values(), key=lambda sample: (-_spread(sample), sample.row))[:SAMPLES]


def _spread(sample: Sample) -> float:
    figures = [figure for figure in sample.figures if figure is not None]
    return max(figures) - min(figures) if figures else 0.0


# --- the verdict -------------------------------------------------------------------------------------------


def _verdict(found: Comparison) -> dict[str, Any]:
    """`verdicts` and `verdict`, and `better` if there is one that is."""
    first = found.trains[0]
    told, winners = {}, {}
    for train in found.trains[1:]:
        each = next((each for each in found.differences.get(train, []) if each.metric == found.metric), None)
        if each is not None:
            told[train] = _told(train, first, each)
            if each.verdict == "better":
                winners[train] = each.second
        elif train in found.not_compared:
            told[train] = f"{train} is not compared row by row: {found.not_compared[train]}."
        else:
            told[train] = f"{train} was not scored by {_title(found.metric)}."
    better = None
    if winners:
        better = (min if found.metric in LOWER_IS_BETTER else max)(winners, key=lambda train: winners[train])
    by_loss = [] if found.differences else _by_loss(found)
    return {"better": better, "verdicts": told, "verdict": "\n".join([*told.values(), *by_loss])}


def _told(train: str, first: str, each: PairedDifference) -> str:
    low, high = each.interval
    told = {"better": f"{train} is better than {first}", "worse": f"{train} is worse than {first}"}
    verdict = told.get(each.verdict, f"{train} and {first} are not told apart")
    few = f"; {each.rows} rows are few for an interval" if each.rows < FEW_ROWS else ""
    test = "" if each.mcnemar_p is None else f", McNemar p {each.mcnemar_p:.3g}"
    return (
        f"{verdict} by {_title(each.metric)}: {each.second:.2f} % against {each.first:.2f} % on {each.rows} rows, "
        f"{each.difference:+.2f} points, {100 * each.confidence:g} % interval [{low:+.2f}, {high:+.2f}]{test}{few}."
    )


def _title(metric: str) -> str:
    return SCORE_TITLES[metric].partition(" (")[0]


def _by_loss(found: Comparison) -> list[str]:
    """What can be said without rows: one figure a train has no interval."""
    measured = ("tuned perplexity",) if len(set(found.versions.get("evaluation rows", [None]))) == 1 else ()
    for name in (*measured, "eval_loss", "loss"):
        column = found.figures.get(name, [])
        if len(column) > 1 and all(value is not None for value in column):
            told = ", ".join(f"{train} {value:.4g}" for train, value in zip(found.trains, column, strict=True))
            return [f"By {name} (less is better; one figure a train, so without an interval): {told}."]
    return []

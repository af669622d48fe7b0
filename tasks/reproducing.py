"""A train run again from its record alone, and whether the same comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from configs.errors import UserError
from configs.records import TrainRecord
from configs.resolve import ResolvedTrain, resolve_train
from methods import contract
from tasks import tracking
from tasks.comparing import compare_kept, scores_of
from tasks.evaluation import Evaluation, read_evaluation
from tasks.files import write_record
from tasks.plots import curves_of
from tasks.stages import EventTail
from tasks.trains import current_status, train_folder

REPORT_FILE = "reproduction.json"
CLOSE = 1e-3
"""Greatest relative difference of what is still called close: another order of additions, as on a GPU."""
_OF_THE_MACHINE = ("second", "memory", "time")

Agreement = Literal["same", "close", "different"]


class CurveAgreement(BaseModel):
    """One curve of both trains."""

    points: int = Field(description="Points of the original.")
    agreement: Agreement
    largest: float = Field(description="Largest relative difference of a point; 1 for one that is missing.")
    step: int | None = Field(default=None, description="First step at which they differ.")


class Reproduction(BaseModel):
    """Whether a train that was run again came to the same."""

    original: str
    again: str
    agreement: Agreement
    curves: dict[str, CurveAgreement]
    figures: dict[str, tuple[float | None, float | None]] = Field(description="Scores and losses of both.")
    answers: int = Field(description="Evaluation rows with an answer of both.")
    answers_same: int = Field(description="Of these, those with the very same answer.")
    versions: dict[str, list[str | None]] = Field(description="Of code and packages, where they differ.")


def pinned_config(record: TrainRecord) -> dict[str, Any]:
    """The configuration of a train with what it had really read: the dataset versions, the very base model.

    A file may have changed since, an alias may have moved on.
    """
    content: dict[str, Any] = record.config.model_dump(mode="json")
    versions = {
        field: version
        for field in ("dataset", "validation_dataset", "evaluation_dataset")
        if (version := getattr(record, field)) is not None and content[field] is not None
    }
    base = {"base_model": record.base} if record.base is not None and "@" in record.config.base_model else {}
    return {**content, **versions, **base}


def reproduction_config(record: TrainRecord) -> ResolvedTrain:
    """The configuration to run a train again with: as far as to a model that can be scored, and told to nobody.

    Raises UserError for a train that has not completed, or that has kept nothing to compare with.
    """
    status = current_status(record)
    if status != "completed":
        raise UserError(
            f"this train is {status}, so there is nothing to reproduce",
            field="train",
            value=record.id,
            mend=f"`tuneline trains resume {record.id}`" if status != "running" else "wait for it",
        )
    if not (_curves(record) or record.evaluation):
        raise UserError("this train has kept neither curves nor scores to compare with", field="train", value=record.id)
    changes: dict[str, Any] = {"through": None, "endpoint": None, "alerts": []}
    found = resolve_train(copied=pinned_config(record) | changes, copied_from=record.id)
    return found.model_copy(update={"origins": found.origins | dict.fromkeys(changes, "reproduction")})


def compare_reproduction(original: TrainRecord, again: TrainRecord) -> Reproduction:
    """Compare curves, figures and answers; kept in the new train's folder and with its MLflow run."""
    curves = _compare_curves(_curves(original), _curves(again))
    figures = _figures(original, again)
    answers, same = _compare_answers(*(read_evaluation(train_folder(each.id), "tuned") for each in (original, again)))
    versions = compare_kept([original, again]).versions
    found = Reproduction(
        original=original.id,
        again=again.id,
        agreement=_worst(
            [
                *(each.agreement for each in curves.values()),
                *map(_agreement, figures.values()),
                "same" if same == answers else "close",
            ]
        ),
        curves=curves,
        figures=figures,
        answers=answers,
        answers_same=same,
        versions={name: column for name, column in versions.items() if column[0] != column[1]},
    )
    write_record(train_folder(again.id) / REPORT_FILE, found)
    tracking.mlflow_client().set_tag(again.run_id, "tuneline.reproduces", original.id)
    tracking.mlflow_client().set_tag(again.run_id, "tuneline.reproduction", found.agreement)
    tracking.log_files(again.run_id, [train_folder(again.id) / REPORT_FILE], "")
    return found


def _curves(record: TrainRecord) -> dict[str, dict[int, float]]:
    """The curves that the machine's speed has no part in, by step."""
    events = EventTail(train_folder(record.id) / "training" / contract.EVENTS_FILE).read()
    return {name: dict(points) for name, points in curves_of(events).items() if _of_the_train(name)}


def _of_the_train(name: str) -> bool:
    return not any(word in name for word in _OF_THE_MACHINE)


def _compare_curves(
    original: Mapping[str, Mapping[int, float]], again: Mapping[str, Mapping[int, float]]
) -> dict[str, CurveAgreement]:
    found = {}
    for name in dict.fromkeys([*original, *again]):
        points, other = original.get(name, {}), again.get(name, {})
        differences = {step: _difference(points.get(step), other.get(step)) for step in sorted({*points, *other})}
        largest = max(differences.values())
        found[name] = CurveAgreement(
            points=len(points),
            agreement=_of_difference(largest),
            largest=largest,
            step=next((step for step, difference in differences.items() if difference > 0), None),
        )
    return found


def _figures(original: TrainRecord, again: TrainRecord) -> dict[str, tuple[float | None, float | None]]:
    told = []
    for record in (original, again):
        outcome = {name: value for name, value in record.outcome.items() if _of_the_train(name)}
        told.append({**outcome, **scores_of(record)})
    return {name: (told[0].get(name), told[1].get(name)) for name in dict.fromkeys([*told[0], *told[1]])}


def _compare_answers(original: Evaluation | None, again: Evaluation | None) -> tuple[int, int]:
    if original is None or again is None:
        return 0, 0
    before = {row["row"]: row["prediction"] for row in original.predictions}
    both = [row for row in again.predictions if row["row"] in before]
    return len(both), sum(row["prediction"] == before[row["row"]] for row in both)


def _difference(one: float | None, other: float | None) -> float:
    """Relative to the larger of the two; 1 if there is only one. Two that are no numbers are the same."""
    if one is None or other is None:
        return 0.0 if one is other else 1.0
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / max(abs(one), abs(other))
    return 1.0 if math.isnan(difference) else difference


def _of_difference(difference: float) -> Agreement:
    if difference == 0:
        return "same"
    return "close" if difference <= CLOSE else "different"


def _agreement(pair: tuple[float | None, float | None]) -> Agreement:
    return _of_difference(_difference(*pair))


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    order: tuple[Agreement, ...] = ("same", "close", "different")
    return max(agreements, key=order.index, default="same")

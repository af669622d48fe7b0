"""Trains side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from configs.records import TrainRecord
from tasks.tracking import flatten

_NOT_COMPARED = {"name", "description"}


class Comparison(BaseModel):
    """What differs between trains: by parameter and by figure, one value a train in their order."""

    trains: list[str]
    parameters: dict[str, list[Any]]
    figures: dict[str, list[float | None]]


def compare_trains(records: Sequence[TrainRecord]) -> Comparison:
    """Parameters that differ (datasets by version), and every outcome and score that any of them has."""
    values = [_parameters(record) for record in records]
    names = sorted({name for each in values for name in each} - _NOT_COMPARED)
    columns = {name: [each.get(name) for each in values] for name in names}
    figures = [_figures(record) for record in records]
    known = dict.fromkeys(name for each in figures for name in each)
    return Comparison(
        trains=[record.id for record in records],
        parameters={name: column for name, column in columns.items() if any(v != column[0] for v in column)},
        figures={name: [each.get(name) for each in figures] for name in known},
    )


def _parameters(record: TrainRecord) -> dict[str, Any]:
    versions = {
        field: getattr(record, field) or getattr(record.config, field)
        for field in ("dataset", "validation_dataset", "evaluation_dataset")
    }
    return {**flatten(record.config), **versions}


def _figures(record: TrainRecord) -> dict[str, float]:
    scores = {f"{which} {name}": value for which, each in record.evaluation.items() for name, value in each.items()}
    return {**record.outcome, **scores}

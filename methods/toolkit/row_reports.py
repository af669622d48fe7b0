"""What became of the rows of a job, told in the same way by whatever read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from methods import contract

ROWS_FILE = "rows.json"
_NOTES_TOLD = 3


class Told(NamedTuple):
    """Of one split: all counts for the record, the line for the log, how many rows were left out and cut, and notes."""

    counts: Mapping[str, Any]
    words: str
    lost: int
    truncated: int
    notes: Sequence[str]


def tell(job: contract.Job, splits: Mapping[str, Told]) -> None:
    """Record the counts of each split, print them, and warn of rows that were left out or cut."""
    path = job.folder / ROWS_FILE
    contract.write_json(path, {split: told.counts for split, told in splits.items()})
    job.artifact(path)
    for split, told in splits.items():
        print(f"{split}: {told.words}", flush=True)
        if told.lost or told.truncated:
            notes = "; ".join(told.notes[:_NOTES_TOLD])
            job.warning(f"{split}: {told.lost} rows left out, {told.truncated} cut ({notes})")

"""The rows of a chat dataset made ready for a trainer, with a report of what was kept and cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import row_reports, tokenizing

Tokenise = Callable[[Any, Path, tokenizing.Limits, int], tuple[Any, tokenizing.RowReport]]


def prepare_rows(
    job: contract.Job,
    tokenizer: Any,
    tokenise: Tokenise | None = None,
    tokenise_validation: Tokenise | None = None,
) -> tuple[Any, Any | None]:
    """Tokenise the training and validation rows of the job and report what was kept and cut.

    Returns two datasets as `tokenise` makes them (the second as `tokenise_validation` does, where it is given), the
    second None without validation rows. Raises Refused.
    """
    p = job.parameters
    tokenise = tokenise or partial(tokenizing.tokenise, turns=tokenizing.Turns.of_job(p))
    limits = tokenizing.Limits(p["max_seq_length"], p["max_input_length"], p["max_content_length"], p["over_length"])
    rows, report = tokenise(tokenizer, Path(job.inputs["train_rows"]), limits, p["max_samples"])
    reports = {"train": report}
    validation = None
    if job.inputs.get("validation_rows"):
        path = Path(job.inputs["validation_rows"])
        validation, reports["validation"] = (tokenise_validation or tokenise)(tokenizer, path, limits, -1)
    row_reports.tell(job, {split: _told(each) for split, each in reports.items()})
    return rows, validation


def _told(report: tokenizing.RowReport) -> row_reports.Told:
    return row_reports.Told(report.as_dict(), report.in_words(), report.lost, report.truncated, report.notes)

"""The rows of a chat dataset made ready for a trainer, with a report of what was kept and cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import tokenizing

Tokenise = Callable[[Any, Path, tokenizing.Limits, int], tuple[Any, tokenizing.RowReport]]


def prepare_rows(job: contract.Job, tokenizer: Any, tokenise: Tokenise = tokenizing.tokenise) -> tuple[Any, Any | None]:
    """Tokenise the training and validation rows of the job and report what was kept and cut.

    Returns two datasets as `tokenise` makes them, the second None without validation rows. Raises Refused.
    """
    p = job.parameters
    limits = tokenizing.Limits(p["max_seq_length"], p["max_input_length"], p["max_content_length"], p["over_length"])
    rows, report = tokenise(tokenizer, Path(job.inputs["train_rows"]), limits, p["max_samples"])
    reports = {"train": report.as_dict()}
    validation = None
    if job.inputs.get("validation_rows"):
        validation, validation_report = tokenise(tokenizer, Path(job.inputs["validation_rows"]), limits, -1)
        reports["validation"] = validation_report.as_dict()
    _report(job, reports)
    return rows, validation


def _report(job: contract.Job, reports: dict[str, dict[str, Any]]) -> None:
    path = job.folder / "rows.json"
    contract.write_json(path, reports)
    job.artifact(path)
    for split, report in reports.items():
        lost = report["read"] - report["kept"]
        print(
            f"{split}: {report['kept']} of {report['read']} rows, {report['tokens']} tokens, "
            f"{report['supervised_share']:.1%} of them trained, longest row {report['longest']}",
            flush=True,
        )
        if lost or report["truncated"]:
            notes = "; ".join(report["notes"][:3])
            job.warning(f"{split}: {lost} rows left out, {report['truncated']} cut ({notes})")

"""`tuneline datasets`: check, add, list, show."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from configs.datasets import RequestedShape
from configs.datasets import Shape as RowShape
from flows.printing import print_fields, print_json, print_table

if TYPE_CHECKING:
    from configs.datasets import DatasetReport, LengthStatistics

app = typer.Typer(help="Datasets: validated, stored once, never changed.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
File = Annotated[Path, typer.Argument(help="A JSON Lines or JSON file.")]
Prompt = Annotated[str | None, typer.Option("--prompt-column", help="Column of the prompt.")]
Completion = Annotated[str | None, typer.Option("--completion-column", help="Column of the answer.")]
_SHAPES = f"How a row is laid out; auto recognises it. Or: {', '.join(get_args(RowShape))}."
Shape = Annotated[RequestedShape, typer.Option(metavar="SHAPE", help=_SHAPES)]


@app.command()
def check(
    file: File,
    prompt_column: Prompt = None,
    completion_column: Completion = None,
    shape: Shape = "auto",
    json_: Json = False,
) -> None:
    """Read a file and report on it; nothing is stored. Exit code 1 if a row is refused."""
    from configs.datasets import Columns
    from tasks.datasets import check_dataset

    columns = Columns(prompt=prompt_column, completion=completion_column)
    report = check_dataset(file, columns, shape)
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        show_report(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def add(
    file: File,
    name: Annotated[str | None, typer.Option(help="Name of the dataset; by default the file's.")] = None,
    prompt_column: Prompt = None,
    completion_column: Completion = None,
    shape: Shape = "auto",
    allow_refused: Annotated[bool, typer.Option(help="Store the good rows although others are refused.")] = False,
    json_: Json = False,
) -> None:
    """Validate a file and store its rows as an immutable version."""
    from configs.datasets import Columns
    from configs.settings import load_settings
    from deployments.services import addresses, connect
    from tasks.datasets import add_dataset

    columns = Columns(prompt=prompt_column, completion=completion_column)
    with contextlib.suppress(OSError):  # a home that cannot be read is told of by whoever stores in it
        if addresses(load_settings()).prefect_api is not None:
            connect(load_settings())  # it is told of the new version
    version = add_dataset(file, name, columns, shape, allow_refused=allow_refused)
    if json_:
        print_json(version.model_dump(mode="json"))
        return
    show_report(version.report)
    print(f"stored as {version.reference}")


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every stored version."""
    from tasks.datasets import list_datasets

    versions = list_datasets()
    if json_:
        print_json([version.model_dump(mode="json", exclude={"report"}) for version in versions])
        return
    rows = [(v.reference, v.rows, v.shape, v.source, v.created) for v in versions]
    print_table(("Dataset", "Rows", "Shape", "From", "Created"), rows, "no datasets yet; `tuneline datasets add FILE`")


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="NAME for the newest version, or NAME@DIGEST.")], json_: Json = False
) -> None:
    """One version, with its report."""
    from tasks.datasets import find_dataset

    version = find_dataset(dataset)
    if json_:
        print_json(version.model_dump(mode="json"))
        return
    stored = {"dataset": version.reference, "folder": version.path.parent, "created": version.created}
    show_report(version.report, stored)


def show_report(report: DatasetReport, first: Mapping[str, object] | None = None) -> None:
    """Print what reading a file found: counts first, then every kind of problem with its first offenders."""
    print_fields(
        {
            **(first or {}),
            "file": report.file,
            "shape": f"{report.shape} ({report.format})",
            "columns": ", ".join(report.columns_seen),
            "rows": f"{report.rows_read} read, {report.rows_kept} kept, {report.rows_refused} refused",
            "duplicates": report.duplicate_rows,
            "prompt characters": _lengths(report.prompt_characters),
            "answer characters": _lengths(report.answer_characters),
            "notes": "\n".join(report.notes) or None,
        }
    )
    for kind, count in {**report.refused, **report.warnings}.items():
        print(f"\n{kind}: {count}")
        for problem in report.problems:
            if problem.kind == kind:
                place = f"line {problem.line}" if problem.line is not None else f"row {problem.row}"
                field = f", field {problem.field}" if problem.field else ""
                print(f"  {place}{field}: {problem.message}")
                print(f"    found {problem.found}; expected {problem.expected}")


def _lengths(statistics: LengthStatistics | None) -> str | None:
    if statistics is None:
        return None
    return ", ".join(f"{name} {value:.0f}" for name, value in statistics.model_dump().items())

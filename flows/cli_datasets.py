"""`tuneline datasets`: check, add, list, show, diff, mix."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from configs.datasets import KIND_TITLES, RequestedShape
from configs.datasets import Shape as RowShape
from flows.printing import console, print_block, print_fields, print_heading, print_json, print_table

if TYPE_CHECKING:
    from configs.datasets import DatasetReport, LengthStatistics, TokenReport

_SHOWN = 300

app = typer.Typer(help="Datasets: validated, stored once, never changed.", no_args_is_help=True)

READS = (
    "Formats: JSON Lines, JSON, CSV, Excel (.xlsx), Parquet, plain text (.txt, documents separated by blank lines), "
    "and a folder or an archive (.zip, .tar, .tar.gz) with a file of rows and images, with images that each have their "
    "caption in a .txt file beside them, or with .txt files that are a document each.\n\n"
    "Shapes, recognised or told with --shape: prompt and completion by columns, Alpaca, OpenAI messages and ShareGPT "
    "conversations (with system, with tools), chosen and rejected answers, answers with scores, anchor and positive "
    "with or without negative, two sentences and a score, an image with messages, with question and answer, or with a "
    "caption, documents in a column text (or content), and the files of Qianfan, Pangu and DeepExtension."
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
File = Annotated[Path, typer.Argument(help="A file of rows, or a folder or archive of rows and images.")]
Prompt = Annotated[str | None, typer.Option("--prompt-column", help="Column of the prompt.")]
Completion = Annotated[str | None, typer.Option("--completion-column", help="Column of the answer.")]
_SHAPES = f"How a row is laid out; auto recognises it. Or: {', '.join(get_args(RowShape))}."
Shape = Annotated[RequestedShape, typer.Option(metavar="SHAPE", help=_SHAPES)]
Against = Annotated[str | None, typer.Option(help="Another dataset or file: tell which rows are in both.")]
Model = Annotated[
    str | None, typer.Option(help="A base model: show the exact prompts, what is trained of them, and their tokens.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Write the whole report as a page into this file.")]


@app.command(epilog=READS)
def check(
    file: File,
    prompt_column: Prompt = None,
    completion_column: Completion = None,
    shape: Shape = "auto",
    against: Against = None,
    model: Model = None,
    page: Html = None,
    json_: Json = False,
) -> None:
    """Read a file and report on it; nothing is stored. Exit code 1 if a row is refused."""
    from configs.datasets import Columns
    from tasks.datasets import check_dataset

    columns = Columns(prompt=prompt_column, completion=completion_column)
    report = check_dataset(file, columns, shape, against=against, base=_base(model))
    _show(report, file.name, page, json_)
    if not report.ok:
        raise typer.Exit(1)


@app.command(epilog=READS)
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
    rows = [(v.reference, v.rows, v.kind, v.shape, v.source, v.created) for v in versions]
    print_table(
        ("Dataset", "Rows", "Kind", "Shape", "From", "Created"), rows, "no datasets yet; `tuneline datasets add FILE`"
    )


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="NAME for the newest version, or NAME@DIGEST.")],
    against: Against = None,
    model: Model = None,
    page: Html = None,
    json_: Json = False,
) -> None:
    """One version, with its report."""
    from tasks.datasets import describe_version, find_dataset

    version = find_dataset(dataset)
    report = describe_version(version, against, _base(model))
    if json_:
        print_json(version.model_copy(update={"report": report}).model_dump(mode="json"))
        _write_page(report, version.reference, page)
        return
    stored = {
        "dataset": version.reference,
        "folder": version.path.parent,
        "created": version.created,
        "mixed of": "\n".join(f"{part.rows:,} rows of {part.reference}" for part in version.parents) or None,
        "seed": version.seed,
    }
    show_report(report, stored)
    _write_page(report, version.reference, page)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="NAME or NAME@DIGEST.")],
    after: Annotated[str, typer.Argument(help="NAME or NAME@DIGEST.")],
    json_: Json = False,
) -> None:
    """How the rows of two versions differ. A changed row keeps its prompt and has another answer."""
    from tasks.dataset_changes import compare_versions
    from tasks.datasets import find_dataset

    changes = compare_versions(find_dataset(before), find_dataset(after))
    if json_:
        print_json(changes.model_dump(mode="json"))
        return
    counts = {name: getattr(changes, name) for name in ("same", "added", "removed", "changed")}
    print_fields({"before": changes.before, "after": changes.after, **counts})
    for name, rows in changes.first.items():
        of = f", the first {len(rows)} of {counts[name]:,}" if counts[name] > len(rows) else ""
        print_heading(f"\n{name}{of}")
        for row in rows:
            lines = [f"line {line}" for line in (row.before, row.after) if line is not None]
            print_block(" → ".join(dict.fromkeys(lines)), row.text)


@app.command()
def mix(
    datasets: Annotated[list[str], typer.Argument(help="DATASET=WEIGHT, two or more; rows are taken in proportion.")],
    name: Annotated[str, typer.Option(help="Name of the new dataset.")],
    rows: Annotated[
        int | None, typer.Option(help="Rows in all; by default the most without a repeated row.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows of a dataset are taken.", min=0)] = 42,
    repeat: Annotated[bool, typer.Option("--repeat", help="Take rows twice and more, where --rows needs it.")] = False,
    json_: Json = False,
) -> None:
    """Make a dataset of several, by weights. Its parents, the seed and the origin of each row are recorded."""
    from tasks.dataset_mixing import mix_datasets

    version = mix_datasets(_weights(datasets), name, rows, seed, repeat=repeat)
    if json_:
        print_json(version.model_dump(mode="json"))
        return
    parts = [(part.reference, part.weight, part.rows) for part in version.parents]
    print_table(("Dataset", "Weight", "Rows"), parts, "nothing")
    print(f"stored as {version.reference}: {version.rows:,} rows")


def _weights(datasets: list[str]) -> dict[str, float]:
    from configs.errors import UserError

    found: dict[str, float] = {}
    for text in datasets:
        reference, equals, weight = text.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not equals or not number > 0 or reference in found:
            what = "this dataset is named twice" if reference in found else "a dataset to mix needs a weight"
            raise UserError(what, field="datasets", value=text, expected="DATASET=WEIGHT, such as orders=2")
        found[reference] = number
    return found


def _base(model: str | None) -> tuple[str, Path] | None:
    """Name and folder of a base model, fetched if need be."""
    from configs.settings import load_settings

    if model is None:
        return None
    from tasks.models import base_folder

    return base_folder(model, load_settings())


def _show(report: DatasetReport, title: str, page: Path | None, json_: bool) -> None:
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        show_report(report)
    _write_page(report, title, page)


def _write_page(report: DatasetReport, title: str, page: Path | None) -> None:
    if page is None:
        return
    from tasks.dataset_report import as_html
    from tasks.files import write_text

    write_text(page, as_html(report, title))
    print(f"the report is written to {page}", file=sys.stderr)


def show_report(report: DatasetReport, first: Mapping[str, object] | None = None) -> None:
    """Print what reading a file found: counts first, then every kind of problem with its first offenders."""
    from tasks.dataset_overlap import overlap_sentence
    from tasks.dataset_report import tokens_sentence

    print_fields(
        {
            **(first or {}),
            "file": report.file,
            "shape": f"{report.shape} ({report.format})",
            "rows are": KIND_TITLES[report.kind] if report.kind else None,
            "columns": ", ".join(report.columns_seen),
            "kept beside": _counted(report.extra_kept),
            "not stored": _counted(report.extra_dropped),
            "rows": f"{report.rows_read} read, {report.rows_kept} kept, {report.rows_refused} refused",
            "duplicates": report.duplicate_rows,
            "images": report.images or None,
            **{f"{name} characters": _lengths(found.characters) for name, found in report.fields.items()},
            "scripts": ", ".join(f"{name} {count}" for name, count in report.scripts.items()) or None,
            "overlap": overlap_sentence(report.overlap, report.rows_kept, report.kind) if report.overlap else None,
            "tokens": _lengths(report.tokens.tokens) if report.tokens else None,
            "trained tokens": _lengths(report.tokens.trained_tokens) if report.tokens else None,
            "tokens are": tokens_sentence(report.tokens) if report.tokens else None,
            "notes": "\n".join(report.notes) or None,
        }
    )
    _show_problems(report)
    if report.tokens:
        _show_prompts(report.tokens)
    else:
        _show_examples(report)


def _counted(names: Mapping[str, int]) -> str | None:
    return ", ".join(f"{name} ({count} rows)" for name, count in names.items()) or None


def _show_problems(report: DatasetReport) -> None:
    for kind, count in {**report.refused, **report.warnings}.items():
        print(f"\n{kind}: {count}")
        for problem in report.problems:
            if problem.kind == kind:
                place = f"line {problem.line}" if problem.line is not None else f"row {problem.row}"
                field = f", field {problem.field}" if problem.field else ""
                print(f"  {place}{field}: {problem.message}")
                print(f"    found {problem.found}; expected {problem.expected}")


def _show_prompts(tokens: TokenReport) -> None:
    """The rendered prompts; what is trained stands in green, or between ⟦ and ⟧ where there is no colour."""
    from rich.text import Text

    out = console()
    for example in tokens.examples:
        print_heading(f"\nline {example.line}{', ' if example.label else ''}{example.label}: {example.tokens} tokens")
        shown = Text()
        for part in example.parts:
            text = _shortened(part.text, part.characters)
            marked = f"⟦{text}⟧" if part.trained and not out.is_terminal else text
            shown.append(marked, style="green" if part.trained else "")
        out.print(shown)


def _shortened(text: str, characters: int) -> str:
    """Both ends of a long text; the page that --html writes has more of it."""
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]} … ({characters - 2 * _SHOWN:,} characters) … {text[-_SHOWN:]}"


def _show_examples(report: DatasetReport) -> None:
    for example in report.examples:
        print_heading(f"\nline {example.line}")
        for part in example.parts:
            more = "…" if part.characters > _SHOWN or len(part.text) < part.characters else ""
            print_block("", f"{part.label}{' (trained)' if part.trained else ''}: {part.text[:_SHOWN]}{more}")


def _lengths(statistics: LengthStatistics | None) -> str | None:
    if statistics is None:
        return None
    return ", ".join(f"{name} {value:.0f}" for name, value in statistics.model_dump().items())

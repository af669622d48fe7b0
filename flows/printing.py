"""How listings and results look in a terminal, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from configs.scoring import SCORE_TITLES

if TYPE_CHECKING:
    from rich.console import Console

    from configs.scoring import PairedDifference, Scores

MAIN_FIGURES = ("accuracy", "contains", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu_4")
_GAP = 2
_SHORT = 20


def console() -> Console:
    """The console of standard output; piped output is not wrapped at a guessed width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(content: object) -> None:
    """Print as JSON; times in ISO form, paths as text."""
    print(json.dumps(content, ensure_ascii=False, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str, title: str | None = None) -> None:
    """Print rows under their headings, or the sentence `empty` if there are none.

    Cells are wrapped between words. Where they do not fit side by side even so, each row becomes a block: its first
    cell, and the others below it with their headings. Nothing is ever cut.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        print(empty)
        return
    least = [max(map(_unbroken, texts)) for texts in zip(columns, *cells, strict=True)]
    if len(columns) > 2 and sum(least) + _GAP * len(least) > console().width:
        _print_blocks(columns, cells, title)
    else:
        _print_grid(columns, cells, title, least)


def _unbroken(text: str) -> int:
    """The width that a cell needs: that of its longest word; a short text, such as a date, stays on one line."""
    from rich.cells import cell_len

    return cell_len(text) if len(text) <= _SHORT else max(map(cell_len, text.split()), default=0)


def _print_grid(
    columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None, least: Sequence[int]
) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    # The last column takes what is left, so that a long path there is folded instead of the names before it.
    widths = [*least[:-1], None]
    table = Table(
        *(Column(name, min_width=width) for name, width in zip(columns, widths, strict=True)),
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        show_header=any(columns),
        box=None,
        padding=(0, _GAP, 0, 0),
        pad_edge=False,
    )
    for row in cells:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    out = console()
    with out.capture() as capture:
        out.print(table)
    # Rows are filled up with blanks, which get in the way of copying and of `grep`.
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _print_blocks(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None) -> None:
    if title:
        print_heading(title)
    for first, *others in cells:
        named = [f"{name}: {cell}" if name else cell for name, cell in zip(columns[1:], others, strict=True)]
        print_block(first, " · ".join(named))


def print_heading(text: str) -> None:
    """Print a heading on a line of its own."""
    from rich.text import Text

    console().print(Text(text, style="bold"))


def print_block(first: str, *below: str) -> None:
    """Print a name, if it has one, and paragraphs indented below it, wrapped between words."""
    from rich.padding import Padding
    from rich.text import Text

    out = console()
    if first:
        out.print(Text(first, style="bold", overflow="fold"))
    for text in below:
        out.print(Padding(Text(text, overflow="fold"), (0, 0, 0, _GAP)))


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one record, a field a line; fields that are not set are left out."""
    print_table(("", ""), [(name, value) for name, value in fields.items() if value is not None], "nothing")


def print_wrapped(items: Sequence[str]) -> None:
    """Print short items one after the other, indented; a line breaks between items only, unless one is too long."""
    from rich.cells import cell_len
    from rich.text import Text

    out = console()
    line = ""
    for item in items:
        if line and cell_len(line) + _GAP + cell_len(item) > out.width:
            out.print(Text(line))
            line = ""
        line += " " * _GAP + item
    out.print(Text(line, overflow="fold"))


def print_warning(text: str) -> None:
    """Print a warning, wrapped between words."""
    from rich.text import Text

    console().print(Text(f"warning: {text}", style="yellow", overflow="fold"))


def print_scores(before: Mapping[str, float] | None, after: Mapping[str, float], names: tuple[str, str]) -> None:
    """Print the figures (percent) of two models side by side, or of one."""
    if before is None:
        rows = [(title, f"{after[key]:.2f}") for key, title in SCORE_TITLES.items() if key in after]
        print_table(("Score in percent", names[1]), rows, "nothing was scored")
    else:
        rows3 = [
            (title, f"{before[key]:.2f}", f"{after[key]:.2f}", f"{after[key] - before[key]:+.2f}")
            for key, title in SCORE_TITLES.items()
            if key in before and key in after
        ]
        print_table(("Score in percent", *names, "Change"), rows3, "nothing was scored")


def print_mean_scores(scores: Scores, figures: Mapping[str, float], name: str) -> None:
    """Print the figures (percent) with their intervals, those of each slice, and what they were computed with."""
    from tasks.scoring import computed_with

    rows = [(title, *_with_interval(scores, figures, key)) for key, title in SCORE_TITLES.items() if key in figures]
    level = f"{100 * scores.confidence:g} % interval"
    print_table(("Score in percent", name, level), rows, "nothing was scored")
    for column, parts in scores.slices.items():
        print()
        sliced = [
            (value, part.rows, *(f"{getattr(part, key):.2f}" for key in MAIN_FIGURES)) for value, part in parts.items()
        ]
        print_table((column, "Rows", *(SCORE_TITLES[key] for key in MAIN_FIGURES)), sliced, "no rows")
    print()
    print(f"{scores.rows} rows, {scores.empty_predictions} of them without an answer; {computed_with(scores)}")


def _with_interval(scores: Scores, figures: Mapping[str, float], key: str) -> tuple[str, str | None]:
    interval = scores.intervals.get(key)
    return f"{figures[key]:.2f}", f"{interval.low:.2f} to {interval.high:.2f}" if interval else None


def print_differences(found: Sequence[PairedDifference], names: tuple[str, str]) -> None:
    """Print two models side by side, metric by metric, with the interval of the difference and what it says."""
    rows = [
        (
            SCORE_TITLES[each.metric],
            f"{each.first:.2f}",
            f"{each.second:.2f}",
            f"{each.difference:+.2f}",
            f"{each.interval.low:+.2f} to {each.interval.high:+.2f}",
            "-" if each.mcnemar_p is None else f"{each.mcnemar_p:.3g}",
            each.verdict,
        )
        for each in found
    ]
    level = f"{100 * found[0].confidence:g} % interval" if found else ""
    columns = ("Score in percent", *names, "Difference", level, "McNemar p", f"{names[1]} is")
    print_table(columns, rows, "nothing to compare")


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)

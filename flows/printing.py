"""How listings and results look in a terminal, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SCORE_TITLES = {
    "accuracy": "Exact accuracy",
    "f1": "F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu_4": "BLEU-4",
    "hit_limit": "Cut at the limit",
}


def console() -> Console:
    """The console of standard output; piped output is not wrapped at a guessed width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(content: object) -> None:
    """Print as JSON; times in ISO form, paths as text."""
    print(json.dumps(content, ensure_ascii=False, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str, title: str | None = None) -> None:
    """Print rows under their headings, or the sentence `empty` if there are none."""
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        print(empty)
        return
    table = Table(*columns, title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one record, a field a line."""
    print_table(("", ""), [(name, value) for name, value in fields.items() if value is not None], "nothing")


def print_scores(before: Mapping[str, float] | None, after: Mapping[str, float], names: tuple[str, str]) -> None:
    """Print the scores (percent) of two models side by side, or of one."""
    if before is None:
        rows = [(title, f"{after[key]:.2f}") for key, title in SCORE_TITLES.items() if key in after]
        print_table(("Score in percent", names[1]), rows, "nothing was scored")
        return
    rows3 = [
        (title, f"{before[key]:.2f}", f"{after[key]:.2f}", f"{after[key] - before[key]:+.2f}")
        for key, title in SCORE_TITLES.items()
        if key in before and key in after
    ]
    print_table(("Score in percent", *names, "Change"), rows3, "nothing was scored")


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)

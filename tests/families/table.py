"""The table family × method: made of what ran, and read from the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.families.cells import CASES, Cell
from tests.families.family_models import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "docs" / "families.md", ROOT / "docs" / "families.zh.md")
START, END = "<!-- families: table -->", "<!-- families: end -->"

NAMES = [family.name for family in FAMILIES]
GROUPS = (
    [case.title for case in CASES if case.method != "peft"],
    [case.title for case in CASES if case.method == "peft"],
)
"""The columns of each of the two tables."""


@dataclass(frozen=True)
class Table:
    """Texts of cells by family and case, as the documents show them, with the reasons of refusals by letter."""

    cells: dict[tuple[str, str], str]
    reasons: dict[str, str]

    def shown(self, family: str, case: str) -> tuple[str, str]:
        """The text of a cell and the reason that it refers to, if any."""
        text = self.cells[family, case]
        state, _, letter = text.partition(" ")
        return (state, self.reasons[letter]) if state == "refused" else (text, "")


def shown(cell: Cell) -> tuple[str, str]:
    """The text of a cell that ran, and its reason."""
    if cell.state == "none":
        return "–", ""
    if cell.state == "ok":
        return f"ok {cell.kept}/{cell.read}", ""
    return cell.state, cell.reason


def markdown(cells: Sequence[Cell]) -> str:
    """Both tables and the reasons of refusals; a cell that did not run is empty."""
    found = {(cell.family, cell.case): shown(cell) for cell in cells}
    texts = {key: text for key, (text, _) in found.items()}
    letters: dict[str, str] = {}
    for family in NAMES:
        for case in (case for group in GROUPS for case in group):
            text, reason = found.get((family, case), ("", ""))
            if reason:
                letter = letters.setdefault(reason, _letter(len(letters)))
                texts[family, case] = f"{text} {letter}"
    lines = [line for group in GROUPS for line in (*_lines(group, texts), "")]
    lines += [f"- {letter}: {reason}" for reason, letter in letters.items()]
    return "\n".join(lines).rstrip() + "\n"


def written(document: Path) -> Table:
    """The table of a document. Raises AssertionError where it is not there."""
    _, start, rest = document.read_text(encoding="utf-8").partition(START)
    text, end, _ = rest.partition(END)
    assert (start, end) == (START, END), f"{document.name} has no table between {START} and {END}"
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        if line.startswith("| family |"):
            columns = _row(line)[1:]
        elif line.startswith("| ---"):
            continue
        elif line.startswith("|"):
            name, *values = _row(line)
            cells |= {(name, column): value for column, value in zip(columns, values, strict=True)}
        elif line.startswith("- "):
            letter, _, reason = line.removeprefix("- ").partition(": ")
            reasons[letter] = reason
    return Table(cells, reasons)


def write(document: Path, text: str) -> None:
    """Put the tables into a document, in place of those it has."""
    before, _, rest = document.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{START}\n{text}{END}{after}", encoding="utf-8")


def _lines(columns: Sequence[str], texts: dict[tuple[str, str], str]) -> list[str]:
    rows = [[name, *(texts.get((name, column), "") for column in columns)] for name in NAMES]
    return [
        f"| family | {' | '.join(columns)} |",
        "| --- |" + " --- |" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _row(line: str) -> list[str]:
    return [value.strip() for value in line.strip().strip("|").split("|")]


def _letter(number: int) -> str:
    return chr(ord("a") + number)

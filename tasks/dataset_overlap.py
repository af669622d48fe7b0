"""What the rows of one dataset have in common with another, such as that of the evaluation."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from configs.datasets import Kind, Overlap
from tasks.dataset_rows import Body, key, prompt_of

_LINES = 10


class Against:
    """The keys of another dataset's rows and prompts, 16 bytes a row; counts which rows of this one are there too."""

    def __init__(self, name: str, rows: Iterable[tuple[Kind, Body]]) -> None:
        self._name = name
        contents, prompts = array("Q"), array("Q")
        for kind, body in rows:
            contents.append(key(body))
            prompts.append(key(prompt_of(kind, body)))
        self._contents, self._prompts = (array("Q", sorted(keys)) for keys in (contents, prompts))
        self._rows = self._shared = 0
        self._lines: list[int] = []

    def count(self, kind: Kind, body: Body, line: int) -> None:
        """Count a row of this dataset, if the other one has it or its prompt."""
        if not _holds(self._prompts, key(prompt_of(kind, body))):
            return
        self._shared += 1
        self._rows += _holds(self._contents, key(body))
        if len(self._lines) < _LINES:
            self._lines.append(line)

    def overlap(self) -> Overlap:
        """What was counted."""
        return Overlap(dataset=self._name, rows=self._rows, prompts=self._shared, lines=self._lines)


def overlap_sentence(overlap: Overlap, rows: int, kind: Kind | None) -> str:
    """What two datasets have in common, in words; `rows` are the kept ones of the first, `kind` is theirs."""
    if kind == "text":
        return _documents_in_common(overlap, rows)
    if not overlap.prompts:
        return f"No row of this dataset asks what a row of {overlap.dataset} asks."
    return (
        f"{overlap.prompts:,} of {rows:,} rows ask what a row of {overlap.dataset} asks, and {overlap.rows:,} of them "
        f"have its answer too; the first: {_lines(overlap)}."
    )


def _documents_in_common(overlap: Overlap, rows: int) -> str:
    if not overlap.rows:
        return f"No document of this dataset is in {overlap.dataset}."
    return f"{overlap.rows:,} of {rows:,} documents are in {overlap.dataset} too; the first: {_lines(overlap)}."


def _lines(overlap: Overlap) -> str:
    return f"{'line' if len(overlap.lines) == 1 else 'lines'} {', '.join(f'{line:,}' for line in overlap.lines)}"


def _holds(keys: array[int], wanted: int) -> bool:
    place = bisect_left(keys, wanted)
    return place < len(keys) and keys[place] == wanted

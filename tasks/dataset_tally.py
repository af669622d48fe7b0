"""What one reading of a dataset finds: counts, lengths, duplicates, scripts, the first offenders and examples."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from configs.datasets import (
    Bin,
    Columns,
    DatasetReport,
    Example,
    ExamplePart,
    FieldStatistics,
    FileFormat,
    LengthStatistics,
    Problem,
)
from tasks.dataset_conversion import Row
from tasks.dataset_rows import Part, main_script, parts
from tasks.dataset_shapes import RowLayout

MAX_LISTED_COLUMNS = 200
EXAMPLES = 3
EXAMPLE_CHARACTERS = 4000
_MORE_COLUMNS = "(columns past the first 200)"
_BUCKETS = 64
_KEYS_HELD = 250_000


class About(NamedTuple):
    """What is known of a dataset before its rows are read. `layout`: None if no row is an object."""

    file: str
    format: FileFormat
    layout: RowLayout | None
    notes: tuple[str, ...]
    size_bytes: int


class Tally:
    """Counts what one reading of a dataset finds, in memory that does not grow with it."""

    def __init__(self, max_problems: int = 3) -> None:
        self._max_problems = max_problems
        self._kept = 0
        self._complete = True
        self._kinds: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._problems: list[Problem] = []
        self._columns: Counter[str] = Counter()
        self._extra_kept: Counter[str] = Counter()
        self._extra_dropped: Counter[str] = Counter()
        self._prompts: Counter[int] = Counter()
        self._answers: Counter[int] = Counter()
        self._turns: Counter[int] = Counter()
        self._fields: dict[str, Counter[int]] = {}
        self._scripts: Counter[str] = Counter()
        self._examples: list[Example] = []
        self._keys = KeyCounter()

    def counted(self, items: Iterable[Row | Problem]) -> Iterator[Row]:
        """The kept rows pass through, everything is counted."""
        with self._keys:
            for item in items:
                if isinstance(item, Problem):
                    self._count_problem(item)
                else:
                    self._count_row(item)
                    yield item
            self._keys.finish()

    def report(self, about: About, images: int) -> DatasetReport:
        """What was found; call it when `counted` is exhausted. `images`: how many different ones the rows show."""
        layout = about.layout
        return DatasetReport(
            file=about.file,
            format=about.format,
            shape=layout.shape if layout else None,
            kind=layout.kind if layout else None,
            columns=layout.columns if layout else Columns(),
            notes=list(about.notes),
            size_bytes=about.size_bytes,
            complete=self._complete,
            rows_read=self._kept + sum(self._refused.values()),
            rows_kept=self._kept,
            refused=dict(self._refused),
            warnings=dict(self._warnings),
            problems=[item.model_copy(update={"count": self._kinds[item.kind]}) for item in self._problems],
            columns_seen=dict(self._columns),
            extra_kept=dict(self._extra_kept),
            extra_dropped=dict(self._extra_dropped),
            duplicate_rows=self._keys.repeated,
            empty_answers=self._refused["empty_answer"],
            prompt_characters=length_statistics(self._prompts),
            answer_characters=length_statistics(self._answers),
            turns=length_statistics(self._turns),
            fields={name: _field_statistics(lengths) for name, lengths in self._fields.items()},
            scripts=dict(self._scripts.most_common()),
            examples=self._examples,
            images=images,
        )

    def _count_problem(self, problem: Problem) -> None:
        self._kinds[problem.kind] += 1
        (self._warnings if problem.level == "warning" else self._refused)[problem.kind] += 1
        if problem.level == "fatal":
            self._complete = False
        if self._kinds[problem.kind] <= self._max_problems:
            self._problems.append(problem)

    def _count_row(self, row: Row) -> None:
        self._kept += 1
        _count_names(self._columns, row.columns)
        _count_names(self._extra_kept, tuple(row.extra))
        _count_names(self._extra_dropped, row.dropped)
        self._keys.add(int.from_bytes(hashlib.sha256(row.content).digest()[:8]))
        found = parts(row.kind, row.body)
        self._count_lengths(found)
        if "messages" in row.body:
            self._turns[sum(message["role"] == "assistant" for message in row.body["messages"])] += 1
        self._scripts[main_script(found)] += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(Example(line=row.place, parts=[_example_part(part) for part in found]))

    def _count_lengths(self, found: list[Part]) -> None:
        totals: dict[str, int] = {}
        for part in found:
            if part.field != "score":
                totals[part.field] = totals.get(part.field, 0) + len(part.text)
        for name, length in totals.items():
            self._fields.setdefault(name, Counter())[length] += 1
        if "prompt" in totals:
            self._prompts[totals["prompt"]] += 1
        if "answer" in totals:
            self._answers[totals["answer"]] += 1


class KeyCounter:
    """Finds out how many 64-bit keys repeat an earlier one; beyond a quarter of a million of them they wait on disk."""

    def __init__(self) -> None:
        self._held = [array("Q") for _ in range(_BUCKETS)]
        self._count = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.repeated = 0

    def __enter__(self) -> KeyCounter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, key: int) -> None:
        """Take a key."""
        self._held[key % _BUCKETS].append(key)
        self._count += 1
        if self._count % _KEYS_HELD == 0:
            self._write()

    def finish(self) -> None:
        """Set `repeated`. Equal keys are in one bucket, so that one is looked at after the other."""
        for number, held in enumerate(self._held):
            if self._folder is not None and (file := self._file(number)).exists():
                held.frombytes(file.read_bytes())
            self.repeated += len(held) - len(set(held))
            self._held[number] = array("Q")

    def _write(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tuneline-keys-")
        for number, held in enumerate(self._held):
            with self._file(number).open("ab") as file:
                held.tofile(file)
            self._held[number] = array("Q")

    def _file(self, number: int) -> Path:
        assert self._folder is not None  # noqa: S101 - made by `_write`, before any file is asked for
        return Path(self._folder.name) / str(number)


def _example_part(part: Part) -> ExamplePart:
    text = part.text[:EXAMPLE_CHARACTERS]
    return ExamplePart(label=part.label, text=text, characters=len(part.text), trained=part.trained)


def _count_names(counter: Counter[str], names: tuple[str, ...]) -> None:
    # A file whose keys are data would otherwise fill the memory.
    for name in names:
        counter[name if name in counter or len(counter) < MAX_LISTED_COLUMNS else _MORE_COLUMNS] += 1


def length_statistics(lengths: Counter[int]) -> LengthStatistics | None:
    """The distribution of lengths that were counted; None if there are none."""
    if not lengths:
        return None
    total = lengths.total()
    ordered = sorted(lengths.items())
    return LengthStatistics(
        min=ordered[0][0],
        mean=round(sum(length * count for length, count in ordered) / total, 2),
        p50=_percentile(ordered, total, 50),
        p95=_percentile(ordered, total, 95),
        max=ordered[-1][0],
    )


def _field_statistics(lengths: Counter[int]) -> FieldStatistics:
    characters = length_statistics(lengths)
    assert characters is not None  # noqa: S101 - a field is made with its first length
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[1 << max(0, length - 1).bit_length()] += count
    return FieldStatistics(
        characters=characters, histogram=[Bin(upto=upto, rows=bins[upto]) for upto in _powers(min(bins), max(bins))]
    )


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    for length, count in ordered:
        rank -= count
        if rank <= 0:
            return length
    return ordered[-1][0]

"""Pairs, triplets and scored pairs of texts: read, limited in length, counted, and put into batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import BatchSampler

from methods import contract
from methods.toolkit import row_reports
from methods.toolkit.training import LengthGroupedOrder

COLUMNS = {
    "pair": ("anchor", "positive"),
    "triplet": ("anchor", "positive", "negative"),
    "scored_pair": ("sentence1", "sentence2"),
}
"""The texts of a row of each kind, in the order in which the losses take them."""

SCORE = "score"
_MOST_NOTES = 10


@dataclass
class RowReport:
    """What became of the rows, in numbers, for the record."""

    kind: str = ""
    read: int = 0
    kept: int = 0
    dropped_over_length: int = 0
    truncated: int = 0
    tokens: int = 0
    longest: int = 0
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, limit: int = -1) -> tuple[str, list[dict[str, Any]]]:
    """The kind of stored rows, and the first `limit` of them (-1: all). Raises Refused if there are none."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if len(rows) == limit:
                break
            rows.append(json.loads(line))
    if not rows:
        raise contract.Refused(f"{path.name} holds no rows")
    return kind_of(rows[0]), rows


def kind_of(row: dict[str, Any]) -> str:
    """What a stored row is: the kind whose texts it has."""
    if "sentence1" in row:
        return "scored_pair"
    return "triplet" if "negative" in row else "pair"


def columns_with_prompts(kind: str, prompts: dict[str, str]) -> dict[str, str]:
    """The columns of a kind, each with the text that stands before its texts: a query's, or a document's.

    The two sentences of a scored pair are alike: neither has one.
    """
    if kind == "scored_pair":
        return dict.fromkeys(COLUMNS[kind], "")
    return {column: prompts["query" if column == "anchor" else "document"] for column in COLUMNS[kind]}


def prepare_rows(job: contract.Job, model: Any) -> tuple[Any, Any | None]:
    """The training and validation rows as datasets with the columns of their kind and `length`; reports what was kept.

    Raises Refused for rows over the length where that is an error, for none left, and for validation rows of another
    kind.
    """
    p = job.parameters
    train, report = _dataset(job, Path(job.inputs["train_rows"]), p["max_samples"], model)
    reports = {"train": report}
    validation = None
    if job.inputs.get("validation_rows"):
        validation, reports["validation"] = _dataset(job, Path(job.inputs["validation_rows"]), -1, model)
        kinds = {split: each.kind for split, each in reports.items()}
        if len(set(kinds.values())) > 1:
            raise contract.Refused(f"the training rows are of the kind {kinds['train']}, those for validation not")
    row_reports.tell(job, {split: _told(each) for split, each in reports.items()})
    return train, validation


def _dataset(job: contract.Job, path: Path, limit: int, model: Any) -> tuple[Any, RowReport]:
    from datasets import Dataset

    p = job.parameters
    kind, rows = read_rows(path, limit)
    columns = COLUMNS[kind]
    report = RowReport(kind=kind, read=len(rows))
    most = model.max_seq_length
    kept: list[dict[str, Any]] = []
    prompts = columns_with_prompts(kind, model.prompts)
    lengths = [_lengths(model, [prompts[column] + row[column] for row in rows]) for column in columns]
    for row, counts in zip(rows, zip(*lengths, strict=True), strict=True):
        if max(counts) > most:
            excess = f"line {row['line']}: {max(counts)} tokens, the longest text may have {most}"
            if p["over_length"] == "error":
                raise contract.Refused(f"{excess}. Raise max_seq_length, or set over_length to drop or truncate.")
            if len(report.notes) < _MOST_NOTES:
                report.notes.append(excess)
            if p["over_length"] == "drop":
                report.dropped_over_length += 1
                continue
            report.truncated += 1
        counts = tuple(min(count, most) for count in counts)
        report.tokens += sum(counts)
        report.longest = max(report.longest, *counts)
        scored = {SCORE: float(row[SCORE])} if kind == "scored_pair" else {}
        kept.append({**{column: row[column] for column in columns}, **scored, "length": max(counts)})
    report.kept = len(kept)
    if not kept:
        raise contract.Refused(
            f"no row is left: all {report.read} are over max_seq_length ({most}): raise it, or truncate them"
        )
    return Dataset.from_list(kept), report


def _lengths(model: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, the special ones included."""
    ids = model.tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return [len(each) for each in ids]


def _told(report: RowReport) -> row_reports.Told:
    words = (
        f"{report.kept} of {report.read} rows ({report.kind}), {report.tokens} tokens, longest text {report.longest}"
    )
    return row_reports.Told(asdict(report), words, report.dropped_over_length, report.truncated, report.notes)


class Batches(BatchSampler):
    """Batches in an order drawn from the seed and the epoch alone; if asked, with no text twice in a batch.

    A row goes into the first batch that has room and none of its texts. There are as many batches as without that
    rule: a row that fits nowhere is left out of the epoch, and `left_out` counts them.
    """

    def __init__(self, texts: list[tuple[str, ...]], order: LengthGroupedOrder, size: int, *, unique: bool) -> None:
        self.texts, self.order, self.batch_size, self.unique = texts, order, size, unique
        self.drop_last = False
        self.left_out = 0

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.texts) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        if not self.unique:
            return iter([order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)])
        batches: list[list[int]] = [[] for _ in range(len(self))]
        held: list[set[str]] = [set() for _ in batches]
        first_with_room, self.left_out = 0, 0
        for row in order:
            while len(batches[first_with_room]) == self.batch_size:
                first_with_room += 1
            texts = set(self.texts[row])
            for place in range(first_with_room, len(batches)):
                if len(batches[place]) < self.batch_size and not texts & held[place]:
                    batches[place].append(row)
                    held[place] |= texts
                    break
            else:
                self.left_out += 1
        return iter(batches)

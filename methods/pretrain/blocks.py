"""The blocks of a job: made of its documents in one pass, kept on disk, counted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import documents, row_reports

_FOLDER = "blocks"
_WRITTEN_AT_ONCE = 256


@dataclass
class BlockReport:
    """What became of the documents of a split, in numbers, for the record."""

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    longest: int = 0
    last: int = 0
    tokens_trained: int = 0
    tokens_dropped: int = 0

    def in_words(self) -> str:
        """The counts in one line of the log."""
        dropped = f", {self.tokens_dropped} tokens left out: blocks of one token" if self.tokens_dropped else ""
        return (
            f"{self.documents} documents, {self.tokens} tokens in {self.blocks} blocks of at most {self.longest}, the "
            f"last one of {self.last}; the loss is taken on {self.tokens_trained} tokens{dropped}"
        )


def prepare_blocks(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """The blocks of the training and validation documents; reports what they are made of.

    Returns two datasets with the columns `input_ids`, `starts` (positions at which a document starts) and `length`, the
    second None without validation rows. They are read from files of the job's folder. Raises Refused if there is
    nothing to train on.
    """
    train, report = _split(job, tokenizer, "train", job.parameters["max_samples"])
    reports = {"train": report}
    validation = None
    if job.inputs.get("validation_rows"):
        validation, reports["validation"] = _split(job, tokenizer, "validation", -1)
    told = {split: row_reports.Told(asdict(each), each.in_words(), 0, 0, []) for split, each in reports.items()}
    row_reports.tell(job, told)
    return train, validation


def remove_blocks(job: contract.Job) -> None:
    """Remove what `prepare_blocks` has written; each process has files of its own."""
    for split in ("train", "validation"):
        _file(job, split).unlink(missing_ok=True)


def _split(job: contract.Job, tokenizer: Any, split: str, limit: int) -> tuple[Any, BlockReport]:
    p = job.parameters
    report = BlockReport()
    cut: documents.Cut = documents.packed if p["packing"] else documents.apart
    texts = documents.read_texts(Path(job.inputs[f"{split}_rows"]), limit)
    found = cut(_counted(tokenizer, texts, report), p["max_seq_length"])
    blocks = _write(_file(job, split), _kept(found, report, separate=p["packing"] and p["separate_documents"]))
    if not report.tokens_trained:
        raise contract.Refused(
            f"nothing to train on: the {split} rows are {report.documents} documents of {report.tokens} tokens in all. "
            "Look at the dataset report."
        )
    return blocks, report


def _counted(tokenizer: Any, texts: Iterable[tuple[int, str]], report: BlockReport) -> Iterator[list[int]]:
    for _, text in texts:
        ids = documents.document_ids(tokenizer, text)
        report.documents += 1
        report.tokens += len(ids)
        yield ids


def _kept(found: Iterable[documents.Block], report: BlockReport, *, separate: bool) -> Iterator[documents.Block]:
    """The blocks that hold a token with one before it: of a single token nothing can be predicted."""
    for block in found:
        first = sum(start > 0 for start in block.starts) if separate else 0
        trained = len(block.ids) - 1 - first
        if len(block.ids) == 1:
            report.tokens_dropped += len(block.ids)
            continue
        report.blocks += 1
        report.tokens_trained += trained
        report.longest = max(report.longest, len(block.ids))
        report.last = len(block.ids)
        yield block


def _file(job: contract.Job, split: str) -> Path:
    return job.folder / _FOLDER / f"{split}-{os.environ.get('RANK', '0')}.arrow"


def _write(file: Path, blocks: Iterable[documents.Block]) -> Any:
    """Write the blocks to a file as they come, and open it as a dataset: memory does not grow with the documents."""
    import pyarrow
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema({"input_ids": numbers, "starts": numbers, "length": pyarrow.int32()})
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        left = iter(blocks)
        while some := list(islice(left, _WRITTEN_AT_ONCE)):
            rows = [{"input_ids": b.ids, "starts": b.starts, "length": len(b.ids)} for b in some]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    return Dataset.from_file(str(file))

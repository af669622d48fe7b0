"""What a base model's own tokenizer and template make of rows: exact prompts, and how long they are in tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.datasets import Bin, Kind, Rendered, RenderedPart, TokenReport
from configs.errors import UserError
from tasks.dataset_rows import key_of_line
from tasks.dataset_tally import EXAMPLES, length_statistics
from tasks.files import last_lines
from tasks.model_server import TOOLKIT, server_environment
from tasks.remote_code import code_variables

BaseFolder = tuple[str, Path]
"""A base model: its name, and the folder with its tokenizer."""

MAX_ROWS = 2000
MAX_BYTES = 32 * 1024 * 1024
BINS = 24
MAX_CHARACTERS = 6000
_SECONDS = 600


class RowSample:
    """The first rows, and at most MAX_ROWS of all, drawn by their content: the same rows give the same sample.

    A row is kept if its key is below a threshold, which is halved whenever too much is held.
    """

    def __init__(self) -> None:
        self._first: list[bytes] = []
        self._drawn: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._threshold = 2**64
        self.seen = 0

    def take(self, stored: bytes) -> None:
        """Take a stored row."""
        self.seen += 1
        if len(self._first) < EXAMPLES:
            self._first.append(stored)
            return
        key = key_of_line(stored)
        if key >= self._threshold:
            return
        self._drawn.append((key, stored))
        self._bytes += len(stored)
        while len(self._drawn) > MAX_ROWS - EXAMPLES or (self._bytes > MAX_BYTES and len(self._drawn) > 1):
            self._threshold //= 2
            self._drawn = [(key, row) for key, row in self._drawn if key < self._threshold]
            self._bytes = sum(len(row) for _, row in self._drawn)

    def rows(self) -> list[bytes]:
        """The first rows, then the drawn ones in the order of the file."""
        return [*self._first, *(row for _, row in self._drawn)]


def token_report(sample: RowSample, kind: Kind, model: str, folder: Path) -> TokenReport:
    """Render the sampled rows with the tokenizer and template in `folder`, in a process of its own.

    Raises UserError if the folder has no tokenizer that can be loaded.
    """
    rows = sample.rows()
    found = _render(rows, kind, model, folder)
    rendered = [entry for entry in found if "renderings" in entry]
    refused = Counter(str(entry["refused"]) for entry in found if "refused" in entry)
    each = [rendering for entry in rendered for rendering in entry["renderings"]]
    tokens = Counter(int(rendering["tokens"]) for rendering in each)
    trained = Counter(int(rendering["trained"]) for rendering in each if rendering["trained"])
    return TokenReport(
        model=model,
        rows=len(rows),
        of_rows=sample.seen,
        not_renderable=dict(refused.most_common(10)),
        tokens=length_statistics(tokens),
        trained_tokens=length_statistics(trained),
        histogram=_histogram(tokens),
        examples=[
            _example(entry, rendering) for entry in found[:EXAMPLES] for rendering in entry.get("renderings", [])
        ],
    )


def _render(rows: Iterable[bytes], kind: Kind, model: str, folder: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="tuneline-render-") as scratch:
        asked, answered, log = (Path(scratch) / name for name in ("rows.jsonl", "rendered.json", "log"))
        asked.write_bytes(b"".join(rows))
        code = code_variables(folder, Path(scratch, "modules"))
        words = [sys.executable, TOOLKIT / "render_rows.py", folder, kind, asked, answered]
        try:
            with log.open("wb") as out:
                subprocess.run(
                    list(map(str, words)),
                    env=server_environment({"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **code}),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    check=True,
                    timeout=_SECONDS,
                )
        except subprocess.SubprocessError as error:
            why = last_lines(log, 1).strip() or str(error)
            raise UserError(
                f"the prompts cannot be rendered with the tokenizer of {model}: {why}",
                file=folder,
                field="model",
                value=model,
                expected="a model whose folder holds its tokenizer",
            ) from error
        content: list[dict[str, Any]] = json.loads(answered.read_text(encoding="utf-8"))
        return content


def _histogram(tokens: Counter[int]) -> list[Bin]:
    if not tokens:
        return []
    width = max(1, -(-max(tokens) // BINS))
    bins: Counter[int] = Counter()
    for length, count in tokens.items():
        bins[max(1, -(-length // width)) * width] += count
    return [Bin(upto=upto, rows=bins[upto]) for upto in range(width, max(bins) + width, width)]


def _example(entry: dict[str, Any], rendering: dict[str, Any]) -> Rendered:
    parts = [
        RenderedPart(text=_cut(text), characters=len(text), trained=trained) for text, trained in rendering["parts"]
    ]
    return Rendered(line=entry["line"], label=rendering["label"], tokens=rendering["tokens"], parts=parts)


def _cut(text: str) -> str:
    """Both ends of a text that is too long to show: the template's marks stand there."""
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}"

"""Documents as tokens, and the blocks that they are trained in. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """Tokens that are trained as one row, and the positions in it at which a document starts."""

    ids: list[int]
    starts: list[int]


Cut = Callable[[Iterable[list[int]], int], Iterator[Block]]
"""Makes blocks of at most so many tokens of documents."""


def read_texts(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Yield (line in the source file, text) of a stored dataset; at most `limit` documents, -1 for all."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines):
            if number == limit:
                return
            row = json.loads(line)
            yield row["line"], row["text"]


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as a beginning-of-sequence token; empty for many."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as the model reads the start of a document; the end token where it would read nothing."""
    return [*start_ids(tokenizer), *text_ids(tokenizer, text)] or [tokenizer.eos_token_id]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """A document as it is trained: what the tokenizer puts before a text, the text, and the end token."""
    return [*start_ids(tokenizer), *text_ids(tokenizer, text), tokenizer.eos_token_id]


def packed(documents: Iterable[list[int]], size: int) -> Iterator[Block]:
    """Documents one after the other, cut every `size` tokens; the last block holds what is left."""
    block = Block([], [])
    for document in documents:
        block.starts.append(len(block.ids))
        done = 0
        while done < len(document):
            taken = document[done : done + size - len(block.ids)]
            block.ids.extend(taken)
            done += len(taken)
            if len(block.ids) == size:
                yield block
                block = Block([], [])
    if block.ids:
        yield block


def apart(documents: Iterable[list[int]], size: int) -> Iterator[Block]:
    """Each document in blocks of its own, cut every `size` tokens."""
    for document in documents:
        for first in range(0, len(document), size):
            yield Block(document[first : first + size], [0] if first == 0 else [])

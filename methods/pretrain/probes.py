"""The starts of some documents, that later stages prove a model by."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from methods.toolkit import chat, documents, probing
from methods.toolkit.tokenizing import Conversation

_TOKENS = 48


def write_probes(folder: Path, tokenizer: Any, rows: Path) -> None:
    """Store the start of the first documents as the message of a user, and the token ids that the template makes of it.

    A deployed model is asked through its chat template, whatever it was trained on; a model without one has a plain one
    that adds a newline. Raises what the template raises.
    """
    talks = [Conversation(0, [*_asked(start), _ANSWER], None) for start in _starts(tokenizer, rows)]
    for talk in talks:
        chat.render_prompt(tokenizer, talk.messages[:-1])  # else what the template refuses is left out
    probing.write_probes(folder, tokenizer, talks)


def write_unrendered(folder: Path, tokenizer: Any, rows: Path) -> None:
    """The same with the token ids of the text alone, for a template that refuses it."""
    starts = _starts(tokenizer, rows)
    probing.write_scored(folder, [(_asked(start), documents.prompt_ids(tokenizer, start)) for start in starts])


_ANSWER = {"role": "assistant", "content": ""}


def _asked(text: str) -> list[chat.Message]:
    return [{"role": "user", "content": text}]


def _starts(tokenizer: Any, rows: Path) -> list[str]:
    texts = (text for _, text in islice(documents.read_texts(rows), probing.PROBE_ROWS))
    # A cut between two bytes of a character leaves none of it.
    return [tokenizer.decode(documents.text_ids(tokenizer, text)[:_TOKENS]).strip("\ufffd \n") for text in texts]

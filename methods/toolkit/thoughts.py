"""The thought of an answer (its reasoning), kept apart from what the answer says. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that a message has its thought under; chat templates and servers read the first one."""

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(rf"^\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)
_OPENED = re.compile(rf"{OPEN}\s*$")
_MARKUP = re.compile(rf"{OPEN}\s*(?:{CLOSE}\s*)?$")
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>", re.DOTALL)
_IN_ROWS = (CLOSE.encode(), *(f'"{field}"'.encode() for field in FIELDS))


def split_message(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """The thought of an assistant message and the text of its answer; the thought is None without one.

    The thought is a field of its own (`reasoning_content`), or a `<think>` block that the content begins with.
    """
    content = message.get("content") or ""
    for field in FIELDS:
        if isinstance(thought := message.get(field), str) and thought.strip():
            return thought.strip("\n"), content
    if isinstance(content, str) and (found := _BLOCK.match(content)):
        return found[1].strip() or None, content[found.end() :]
    return None, content


def split_answer(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """The thought and the answer of a generated text; the thought is None without one.

    `text` is decoded with special tokens where the model writes channels (gpt-oss). `opened`: the prompt has begun
    the thought (DeepSeek-R1). A thought that never ends is a thought without an answer.
    """
    if "<|channel|>" in text:
        thought = "\n".join(part.strip() for part in _CHANNEL.findall(text))
        _, channel, answer = text.rpartition(_FINAL_CHANNEL)
        return thought or None, answer if channel else ""
    begun = opened or text.lstrip().startswith(OPEN)
    if not begun:
        return None, text
    thought, closed, answer = text.partition(CLOSE)
    return thought.replace(OPEN, "", 1).strip() or None, answer if closed else ""


def leaves_open(prompt: str) -> bool:
    """Whether a prompt ends inside a thought that the model is to go on with."""
    return _OPENED.search(prompt) is not None


def without_markup(prompt: str) -> str:
    """The prompt without the thought that it opens, or opens and closes, at its end."""
    return _MARKUP.sub("", prompt)


def without_block(answer: str) -> str:
    """The rendered answer without the `<think>` block that it begins with."""
    return _BLOCK.sub("", answer, count=1)


def rows_have_thoughts(path: Path) -> bool:
    """Whether any row of a stored dataset (JSON Lines) holds a thought."""
    with path.open("rb") as file:
        return any(mark in line for line in file for mark in _IN_ROWS)

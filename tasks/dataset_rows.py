"""Stored rows of every kind: their texts, what they ask, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from configs.datasets import Kind
from tasks.dataset_fields import encoded

Body = dict[str, Any]
_BESIDE = ("line", "extra")
_SCRIPTS = {
    "han": r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": r"\u3040-\u30ff\u31f0-\u31ff",
    "hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "cyrillic": r"\u0400-\u052f",
    "greek": r"\u0370-\u03ff",
    "arabic": r"\u0600-\u06ff\u0750-\u077f",
    "hebrew": r"\u0590-\u05ff",
    "devanagari": r"\u0900-\u097f",
    "thai": r"\u0e00-\u0e7f",
    "latin": r"A-Za-z\u00c0-\u024f",
}
_LETTERS = {name: re.compile(f"[{characters}]") for name, characters in _SCRIPTS.items()}
_LETTER = re.compile("[A-Za-z]")
_SCRIPT_SAMPLE = 200
_LETTERS_OF_A_WORD = 5


class Part(NamedTuple):
    """A text of a row. `field` is what lengths are counted by; `trained` what a method for the kind learns to say."""

    field: str
    label: str
    text: str
    trained: bool = False


def parts(kind: Kind, body: Body) -> list[Part]:
    """The texts of a row in the order that they are read in."""
    if kind in ("chat", "chat_tools", "vision"):
        *asked, answer = body["messages"]
        told = [_message(message, "prompt") for message in asked]
        return [*_tools(body), *told, _message(answer, "answer")]
    if kind == "preference":
        chosen = [_message(message, "chosen") for message in body["chosen"]]
        rejected = [_message(message, "rejected")._replace(trained=False) for message in body["rejected"]]
        return [*_tools(body), *_asked(body), *_relabelled(chosen, "chosen"), *_relabelled(rejected, "rejected")]
    if kind == "ranking":
        ranked = zip(body["answers"], body["scores"], strict=True)
        return [*_asked(body), *(Part("answer", f"answer, score {score:g}", text, True) for text, score in ranked)]
    texts = {name: str(value) for name, value in body.items() if name != "image"}
    return [Part(name, name, text, name in ("caption", "score", "text")) for name, text in texts.items()]


def _asked(body: Body) -> list[Part]:
    return [_message(message, "prompt")._replace(trained=False) for message in body["prompt"]]


def _relabelled(found: list[Part], name: str) -> list[Part]:
    return [part._replace(label=f"{name}: {part.label}") for part in found]


def _tools(body: Body) -> list[Part]:
    tools = body.get("tools")
    return [Part("tools", "tools", json.dumps(tools, ensure_ascii=False))] if tools else []


def _message(message: Body, field: str) -> Part:
    content = message["content"]
    if isinstance(content, list):
        content = "".join("<image>" if item["type"] == "image" else item["text"] for item in content)
    if message.get("tool_calls"):
        content = f"{content or ''}{json.dumps(message['tool_calls'], ensure_ascii=False)}"
    return Part(field, message["role"], content or "", message["role"] == "assistant")


def prompt_of(kind: Kind, body: Body) -> object:
    """The part of a row that is asked; rows that share it differ only in their answers.

    A conversation and a preference pair that ask the same share it too.
    """
    if kind in ("preference", "ranking"):
        return [body["prompt"], body["tools"]] if "tools" in body else body["prompt"]
    if kind in ("chat", "chat_tools", "vision"):
        asked = body["messages"][:-1]
        beside = [body[name] for name in ("tools", "images") if name in body]
        return [asked, *beside] if beside else asked
    return [value for name, value in body.items() if name not in ("positive", "negative", "score", "caption")]


def key(content: object) -> int:
    """The first 8 bytes of the hash of a row, or of its prompt."""
    return key_of_line(encoded(content))


def key_of_line(stored: bytes) -> int:
    """The first 8 bytes of the hash of a stored row as it is."""
    return int.from_bytes(hashlib.sha256(stored).digest()[:8])


def main_script(found: list[Part]) -> str:
    """The script that most of the start of a row's texts is written in; `none` without letters.

    Japanese is `kana` and Chinese is `han`: Japanese texts have both, so kana weigh double. A Chinese text with names
    or code in Latin letters stays Chinese: five such letters weigh as one character.
    """
    sample = " ".join(part.text[:_SCRIPT_SAMPLE] for part in found[:4])
    if sample.isascii():
        return "latin" if _LETTER.search(sample) else "none"
    counts = dict.fromkeys(_SCRIPTS, 0.0)
    for character, count in Counter(sample).items():
        if (script := _script(character)) is not None:
            counts[script] += count
    counts["latin"] /= _LETTERS_OF_A_WORD
    if counts["kana"]:
        counts["kana"] = 2 * counts["kana"] + counts["han"]
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "none"


@lru_cache(maxsize=65_536)
def _script(character: str) -> str | None:
    return next((name for name, pattern in _LETTERS.items() if pattern.match(character)), None)


def read_stored(path: Path) -> Iterator[tuple[int, Body, bytes]]:
    """Line in the file it came from, body and stored line of each row of a version."""
    with path.open("rb") as file:
        for stored in file:
            row = json.loads(stored)
            yield row["line"], body_of(row), stored


def body_of(row: Body) -> Body:
    """A stored row without what does not make it the same as another."""
    return {name: value for name, value in row.items() if name not in _BESIDE}

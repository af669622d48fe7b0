"""Program: the exact prompts that training makes of stored rows, which part of them is trained, and their lengths.

`PYTHON render_rows.py MODEL_FOLDER KIND ROWS_JSONL OUTPUT_JSON`. ROWS_JSONL holds stored rows of the kind. OUTPUT_JSON
gets a list with an entry a row: `{"line", "renderings": [{"label", "tokens", "trained", "parts": [[text, trained]]}]}`,
or `{"line", "refused": why}`; `parts` are left out past the first rows.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods.toolkit import remote_code
from methods.toolkit.chat import IGNORED, Rendered, follow_rows, load_tokenizer, render_conversation, render_prompt
from methods.toolkit.chat_template import TemplateSettings
from methods.toolkit.documents import document_ids
from methods.toolkit.tokenizing import RowReport, Turns, talks

EXAMPLES = 3

Part = tuple[str, bool]


def renderings(tokenizer: Any, kind: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What training reads of a row. Raises ValueError where the template refuses it."""
    if kind in ("chat", "chat_tools"):
        found = talks(tokenizer, row, Turns(), RowReport())
        for number, talk in enumerate(found, start=1):
            label = f"answer {number}" if len(found) > 1 else ""
            yield {"label": label, **_shown(tokenizer, talk.render(), 0)}
    elif kind in ("preference", "ranking"):
        tools = row.get("tools")
        start = len(render_prompt(tokenizer, row["prompt"], tools))
        for label, better, answer in _answers(kind, row):
            said = render_conversation(tokenizer, [*row["prompt"], *answer], len(row["prompt"]), tools)
            yield {"label": label, **_shown(tokenizer, said, start if better else None)}
    elif kind == "text":
        ids = document_ids(tokenizer, row["text"])
        yield {"label": "", "tokens": len(ids), "trained": len(ids), "parts": [(tokenizer.decode(ids), True)]}
    elif kind == "vision":
        yield {"label": "", **_rendered_text(tokenizer, row)}
    else:
        for name in ("anchor", "positive", "negative", "sentence1", "sentence2", "caption"):
            if name in row:
                ids = tokenizer(row[name])["input_ids"]
                yield {"label": name, "tokens": len(ids), "trained": 0, "parts": [(tokenizer.decode(ids), False)]}


def _answers(kind: str, row: dict[str, Any]) -> list[tuple[str, bool, list[dict[str, str]]]]:
    """The answers of a row: their label, whether no other is better, and their messages."""
    if kind == "preference":
        return [(side, side == "chosen", row[side]) for side in ("chosen", "rejected")]
    scored = zip(row["answers"], row["scores"], strict=True)
    best = max(row["scores"])
    return [(f"score {score:g}", score == best, [{"role": "assistant", "content": answer}]) for answer, score in scored]


def _shown(tokenizer: Any, found: Rendered, start: int | None) -> dict[str, Any]:
    trained = [start is not None and place >= start and label != IGNORED for place, label in enumerate(found.labels)]
    parts: list[Part] = []
    for is_trained, places in groupby(range(len(trained)), trained.__getitem__):
        first, *others = places
        last = others[-1] if others else first
        parts.append((tokenizer.decode(found.input_ids[first : last + 1]), is_trained))
    return {"tokens": len(trained), "trained": sum(trained), "parts": parts}


def _rendered_text(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """A conversation with images, by its text: an image is what the template writes in its place."""
    parts: list[Part] = []
    done = ""
    for place, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        before = _text(tokenizer, row, place, asked=True)
        after = _text(tokenizer, row, place + 1, asked=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(f"the chat template rewrites the turns before message {place + 1}")
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    sizes = [(len(tokenizer(text, add_special_tokens=False)["input_ids"]), trained) for text, trained in parts]
    tokens = sum(size for size, _ in sizes)
    return {"tokens": tokens, "trained": sum(size for size, trained in sizes if trained), "parts": parts}


def _text(tokenizer: Any, row: dict[str, Any], messages: int, *, asked: bool) -> str:
    shown = row["messages"][:messages]
    text: str = tokenizer.apply_chat_template(
        shown, tools=row.get("tools"), add_generation_prompt=asked, tokenize=False
    )
    return text


def _tokenizer(folder: str, kind: str, rows: Path) -> Any:
    if kind == "text":
        return load_tokenizer(folder)[0]
    if kind in ("chat", "chat_tools", "preference", "ranking", "vision"):
        tokenizer, _ = load_tokenizer(folder)
        follow_rows(tokenizer, TemplateSettings(), rows)
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **remote_code.loading(folder))


def _without_torch() -> None:
    """Hide torch from transformers: a tokenizer needs none, and loading it takes most of the time."""
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
    # What is None there cannot be imported.
    sys.modules["torch"] = None  # type: ignore[assignment]


def main() -> None:
    """Render every row."""
    _without_torch()
    from jinja2.exceptions import TemplateError

    folder, kind, rows, output = sys.argv[1:]
    tokenizer = _tokenizer(folder, kind, Path(rows))
    found: list[dict[str, Any]] = []
    with Path(rows).open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            try:
                told = {"renderings": list(renderings(tokenizer, kind, row))}
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                found.append({"line": row["line"], "refused": str(error)[:200]})
                continue
            for rendering in told["renderings"] if number >= EXAMPLES else []:
                del rendering["parts"]
            found.append({"line": row["line"], **told})
    Path(output).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()

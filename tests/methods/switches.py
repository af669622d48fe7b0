"""A small task for methods that learn from rewards: the state in which somebody wants a thing, `on` or `off`.

The tiny model is taught to answer with one of the two, the wrong one a little more often than the right one: sampled
answers are of the right kind, greedy ones are wrong, and there is something to learn from rewards alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

THINGS = ("light", "fan", "heater", "radio", "lamp", "door", "kettle", "screen", "oven", "clock")
ROOMS = ("kitchen", "hall", "attic", "cellar")
OTHER = {"on": "off", "off": "on"}


def questions() -> list[tuple[str, str]]:
    """Every question with its right answer, in a fixed order without a pattern."""
    found = [(f"{state} {thing} {room}", state) for thing in THINGS for room in ROOMS for state in OTHER]
    random.Random(1).shuffle(found)  # noqa: S311 - the same order each time
    return found


def write_rows(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """Stored chat rows of questions and answers."""
    with path.open("w", encoding="utf-8") as file:
        for line, (question, answer) in enumerate(pairs, start=1):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"line": line, "messages": messages}) + "\n")
    return path


def write_pairs(path: Path, start: int, end: int) -> Path:
    """Stored preferences of these questions: the right answer before the wrong one."""
    with path.open("w", encoding="utf-8") as file:
        for line, (question, answer) in enumerate(questions()[start:end], start=1):
            said = [[{"role": "assistant", "content": text}] for text in (answer, OTHER[answer])]
            prompt = [{"role": "user", "content": question}]
            file.write(json.dumps({"line": line, "prompt": prompt, "chosen": said[0], "rejected": said[1]}) + "\n")
    return path


def taught_model(base: Path, folder: Path, pairs: Iterable[tuple[str, str]], steps: int = 60) -> Path:
    """The tiny model, taught with two right and three wrong answers to each question."""
    import torch
    from transformers import AutoModelForCausalLM

    from methods.toolkit import chat

    tokenizer, _ = chat.load_tokenizer(str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = [_row(tokenizer, question, answer) for question, answer in pairs]
    rows += [_row(tokenizer, question, OTHER[answer]) for question, answer in pairs]
    weights = torch.tensor([0.4] * (len(rows) // 2) + [0.6] * (len(rows) // 2))
    width = max(len(row.input_ids) for row in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row.input_ids + [pad] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [chat.IGNORED] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        loss = (losses.sum(dim=1) * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(tokenizer: Any, question: str, answer: str) -> Any:
    from methods.toolkit import chat

    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat.render_conversation(tokenizer, messages)

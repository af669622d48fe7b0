"""Stored rows of pairs and rankings: small ones, and some that follow a rule a tiny model can learn."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from methods.toolkit import likelihood, preference_rows

ROOMS = ("kitchen", "hall", "attic")
POLITE = ("thanks", "gladly", "of course", "sure", "with pleasure", "happy to")
RUDE = ("no way", "go away", "why me", "ugh", "not now", "do it yourself")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Store rows, each with the line it came from."""
    lines = [json.dumps({"line": number, **row}) + "\n" for number, row in enumerate(rows, start=1)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair_rows() -> list[dict[str, Any]]:
    """21 pairs of different lengths; one goes on for two turns, one has a system message."""
    rows: list[dict[str, Any]] = []
    for index in range(21):
        room, wanted = ROOMS[index % 3], "on" if index % 2 else "off"
        rows.append(
            {
                "prompt": asked(f"switch the light in the {room} {wanted}" + " now" * (index % 5)),
                "chosen": said(f"{room} " + "on " * (1 + index % 4)),
                "rejected": said("no" * (1 + index % 3)),
            }
        )
    rows[5]["chosen"] += [*asked("and off"), *said("it is off")]
    rows[6]["prompt"].insert(0, {"role": "system", "content": "be short"})
    return rows


def ranking_rows() -> list[dict[str, Any]]:
    """7 rankings of three answers, the best one in the middle; two worse ones of the first are equally bad."""
    rows = [
        {
            "prompt": asked(f"switch the light in the {ROOMS[index % 3]} on" + " now" * index),
            "answers": ["no", f"{ROOMS[index % 3]} on", "off"],
            "scores": [0.0, 3.0, 1.0],
        }
        for index in range(7)
    ]
    rows[0]["scores"] = [0.0, 2.5, 0.0]
    return rows


def polite_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs whose better answer is polite and whose worse one is rude, about random lights."""
    random = Random(seed)  # noqa: S311 - a dataset
    rows = []
    for _ in range(count):
        words = [random.choice(("light", "heater", "fan", "radio")), random.choice(ROOMS), random.choice(("on", "off"))]
        done = f"the {words[0]} in the {words[1]} is {words[2]}"
        sides = [f"{random.choice(POLITE)}, {done}", f"{random.choice(RUDE)}, {done}"]
        rows.append(
            {
                "prompt": asked(f"switch the {words[0]} in the {words[1]} {words[2]}"),
                "chosen": said(sides[0]),
                "rejected": said(sides[1]),
            }
        )
    return rows


def preferences(model: Any, tokenizer: Any, rows: Path) -> list[float]:
    """By how much the model finds the better answer of each row likelier than the worse one, in nats."""
    pairs = list(preference_rows.read_pairs(rows, -1))
    found = likelihood.answer_likelihoods(
        model, tokenizer, [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    )
    return [better.logprob - worse.logprob for better, worse in zip(found[::2], found[1::2], strict=True)]

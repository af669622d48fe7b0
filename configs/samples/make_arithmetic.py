"""Writes the sample dataset of grpo-demo: small sums in words, each with its result.

    python configs/samples/make_arithmetic.py [FOLDER]

Goes to FOLDER/arithmetic (FOLDER: where this file lies) as train.jsonl, validation.jsonl and test.jsonl with the keys
`prompt` and `completion`. The completion is the bare number, which the rewards of a train compare an answer with. The
seed is fixed: every run writes the same bytes. No sum of validation or test (the two numbers and the operation) is in
train.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

SEED = 20261125
SIZES = {"train": 240, "validation": 32, "test": 40}
LARGEST = 12
ASKED = {
    "+": (
        "What is {a} plus {b}?",
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "Add {a} and {b}.",
    ),
    "-": (
        "What is {a} minus {b}?",
        "{name} has {a} {things} and gives {b} away. How many {things} are left?",
        "Take {b} away from {a}.",
    ),
}
REPLY = "Reply with the number only."
NAMES = ("Anna", "Bao", "Carla", "Deniz", "Emil")
THINGS = ("apples", "books", "coins", "pencils", "stamps")

Row = dict[str, str]


def sums() -> list[tuple[int, str, int]]:
    """Every sum and difference of small numbers that gives no negative one."""
    numbers = range(1, LARGEST + 1)
    return [(a, sign, b) for a in numbers for b in numbers for sign in ASKED if sign == "+" or a > b]


def say(random: Random, a: int, sign: str, b: int) -> Row:
    """One sum in one of its ways of asking."""
    question = pick(random, ASKED[sign]).format(a=a, b=b, name=pick(random, NAMES), things=pick(random, THINGS))
    return {"prompt": f"{question} {REPLY}", "completion": str(a + b if sign == "+" else a - b)}


def pick(random: Random, choices: Sequence[str]) -> str:
    """One of `choices`. Of all methods of Random, only random() is promised to stay the same for a seed."""
    return choices[int(random.random() * len(choices))]


def make_splits() -> dict[str, list[Row]]:
    """The rows of every split, by its name."""
    random = Random(SEED)  # noqa: S311 - not a secret
    left = sums()
    left.sort(key=lambda _: random.random())
    splits: dict[str, list[Row]] = {}
    for split, size in sorted(SIZES.items()):  # the held-out ones first: train says its sums more than once
        if split != "train":
            splits[split] = [say(random, *left.pop()) for _ in range(size)]
    rows = {row["prompt"]: row for _ in range(20) for row in (say(random, *each) for each in left)}
    splits["train"] = sorted(rows.values(), key=lambda _: random.random())[: SIZES["train"]]
    return splits


def main(folder: Path) -> None:
    """Write every split under `folder`, whole or not at all."""
    for split, rows in make_splits().items():
        path = folder / "arithmetic" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)

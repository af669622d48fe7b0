"""Writes a sample dataset of pairs: what somebody asks about an alarm of a machine, and what is to be done.

    python configs/samples/make_alarms.py [FOLDER]

It goes to FOLDER/alarms (FOLDER: where this file lies) as train.jsonl, validation.jsonl and test.jsonl with the keys
`anchor` and `positive`. The seed is fixed: every run writes the same bytes. What a code means is invented, so that no
model knows it before it has been trained; each split asks about the same codes in words that no other split uses.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from random import Random

SEED = 20261125
CODES = 48
PLACES = ("pump", "valve", "rotor", "sensor", "belt", "motor", "filter", "relay")
ACTIONS = (
    "Replace the {place} and restart the line.",
    "Tighten the bolts of the {place} before the next shift.",
    "Clean the {place} with compressed air.",
    "Recalibrate the {place} at standstill.",
    "Lubricate the {place} and let it run for five minutes.",
    "Switch the {place} off and call the electrician.",
)
QUESTIONS = {
    "train": (
        "What should I do when alarm {code} appears?",
        "{code} error, how to fix",
        "the display says {code}, what now?",
    ),
    "validation": ("Machine stopped with {code}. What is the remedy?",),
    "test": ("We are getting {code} again, which repair is needed?",),
}


def make_codes(random: Random) -> list[str]:
    """Different codes of two letters and three digits."""
    codes: set[str] = set()
    while len(codes) < CODES:
        letters = "".join(random.choice("BDFGKLMNPRSTVZ") for _ in range(2))
        codes.add(f"{letters}-{random.randint(100, 999)}")
    return sorted(codes)


def make_splits() -> dict[str, list[dict[str, str]]]:
    """The rows of each split."""
    random = Random(SEED)  # noqa: S311 - a sample, no secret
    codes = make_codes(random)
    answers = [action.format(place=place) for place, action in product(PLACES, ACTIONS)]
    random.shuffle(answers)
    splits = {}
    for split, questions in QUESTIONS.items():
        pairs = zip(codes, answers, strict=True)
        rows = [
            {"anchor": question.format(code=code), "positive": answer}
            for code, answer in pairs
            for question in questions
        ]
        random.shuffle(rows)
        splits[split] = rows
    return splits


def main() -> None:
    """Write the files."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder = root / "alarms"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()

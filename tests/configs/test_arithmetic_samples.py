"""The sample data of grpo-demo: written by its script, right, and held out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "samples"
SIZES = {"train": 240, "validation": 32, "test": 40}


def rows(split: str) -> list[dict[str, str]]:
    lines = (SAMPLES / "arithmetic" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def asked(row: dict[str, str]) -> tuple[int, str, int]:
    """The sum in a question: its numbers and its sign."""
    first, second = map(int, re.findall(r"\d+", row["prompt"]))
    if row["prompt"].startswith("Take"):
        first, second = second, first
    return first, "-" if re.search(r"minus|gives|Take", row["prompt"]) else "+", second


def test_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SAMPLES / "make_arithmetic.py"), str(tmp_path)], check=True)
    for split, size in SIZES.items():
        committed = (SAMPLES / "arithmetic" / f"{split}.jsonl").read_bytes()
        assert (tmp_path / "arithmetic" / f"{split}.jsonl").read_bytes() == committed
        assert len(committed.splitlines()) == size


def test_every_answer_is_right_and_no_sum_of_training_is_asked_again() -> None:
    sums = {split: {asked(row) for row in rows(split)} for split in SIZES}
    for row in (row for split in SIZES for row in rows(split)):
        first, sign, second = asked(row)
        assert row["completion"] == str(first + second if sign == "+" else first - second)
    assert not sums["train"] & (sums["validation"] | sums["test"])
    assert not sums["validation"] & sums["test"]

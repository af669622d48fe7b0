from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "samples"
SIZES = {
    "commands_en": {"train": 480, "validation": 40, "test": 60},
    "commands_zh": {"train": 300, "validation": 40, "test": 60},
}
LANGUAGES = sorted(SIZES)
COURTESIES = str.maketrans("", "", ".,?。，？ ")


def rows(language: str, split: str) -> list[dict[str, Any]]:
    lines = (SAMPLES / language / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def commands(row: dict[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(row["completion"])
    return found


@pytest.mark.parametrize(
    ("script", "folders"),
    [
        ("make_commands", ["commands_en", "commands_zh"]),
        ("make_preferences", ["preferences_en", "rankings_en"]),
        ("make_manual", ["manual_en"]),
        ("make_tools", ["tools_en"]),
    ],
)
def test_script_writes_the_committed_files_byte_for_byte(tmp_path: Path, script: str, folders: list[str]) -> None:
    subprocess.run([sys.executable, str(SAMPLES / f"{script}.py"), str(tmp_path)], check=True)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    committed = {path.relative_to(SAMPLES): path.read_bytes() for name in folders for path in SAMPLES.glob(f"{name}/*")}
    assert written == committed
    assert len(committed) == 3 * len(folders)


def test_better_and_worse_commands_are_what_they_are_called() -> None:
    for split in ("train", "validation", "test"):
        right = {row["prompt"]: row["completion"] for row in rows("commands_en", split)}
        pairs, rankings = rows("preferences_en", split), rows("rankings_en", split)
        assert len(pairs) == len(rankings) >= 40
        for pair in pairs:
            assert pair["chosen"] == right[pair["prompt"]] != pair["rejected"]
        for ranking in rankings:
            by_score = dict(zip(ranking["scores"], ranking["answers"], strict=True))
            best, wordy, wrong = (by_score[score] for score in (2, 1, 0))
            assert best == right[ranking["prompt"]]
            assert best in wordy != best
            assert json.loads(wrong) != json.loads(best)
        assert len({tuple(ranking["scores"]) for ranking in rankings}) == 6  # the best one stands anywhere


@pytest.mark.parametrize("language", LANGUAGES)
def test_splits_have_their_sizes_and_share_no_prompt(language: str) -> None:
    splits = {split: rows(language, split) for split in SIZES[language]}
    assert {split: len(found) for split, found in splits.items()} == SIZES[language]
    prompts = [row["prompt"].lower().translate(COURTESIES) for found in splits.values() for row in found]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_in_their_normal_form(language: str) -> None:
    for row in (row for split in SIZES[language] for row in rows(language, split)):
        assert row.keys() == {"prompt", "completion"}
        assert json.dumps(json.loads(row["completion"]), separators=(",", ":")) == row["completion"]
        assert 1 <= len(commands(row)) <= 2
        for command in commands(row):
            keys = ["device", "room", "action", "level", "time"]
            assert list(command) == [key for key in keys if key in command]
            assert ("level" in command) == (command["action"] == "set")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_value_of_the_test_split_was_learnt(language: str) -> None:
    def values(split: str) -> Counter[tuple[str, str]]:
        keys = ("device", "room", "action")
        return Counter((key, c[key]) for row in rows(language, split) for c in commands(row) for key in keys)

    learnt = values("train")
    assert {value: learnt[value] for value in values("test") if learnt[value] < 8} == {}


def test_prompts_and_answers_are_short() -> None:
    for language in LANGUAGES:
        for row in (row for split in SIZES[language] for row in rows(language, split)):
            assert len(row["prompt"].split()) <= 30
            assert len(row["prompt"]) <= 150
            assert len(row["completion"]) <= 140


def test_the_sample_images_are_those_of_their_script_and_no_split_shows_an_image_of_another(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SAMPLES / "make_shapes.py"), str(tmp_path)], check=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert written == sorted(path.relative_to(SAMPLES) for path in (SAMPLES / "shapes").rglob("*.*"))
    for name in written:
        ours, theirs = tmp_path / name, SAMPLES / name
        # Pixel by pixel: how a PNG is packed depends on the library's version.
        assert pixels(ours) == pixels(theirs) if name.suffix == ".png" else ours.read_bytes() == theirs.read_bytes()
    splits = {split: [row["image"] for row in rows("shapes", split)] for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 32, "validation": 8, "test": 8}
    shown = [pixels(SAMPLES / "shapes" / name) for found in splits.values() for name in found]
    assert len(set(shown)) == 48
    assert sorted(row["image"] for row in rows("shapes", "captions")) == sorted(splits["train"])


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.convert("RGB").tobytes()

"""Two versions compared, and several mixed into one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.datasets import DatasetVersion
from configs.errors import UserError
from tasks.dataset_changes import compare_versions
from tasks.dataset_mixing import mix_datasets
from tasks.datasets import add_dataset, find_dataset, list_datasets


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def stored(tmp_path: Path, name: str, *rows: tuple[str, str] | dict[str, Any]) -> DatasetVersion:
    path = tmp_path / f"{name}.jsonl"
    texts = [row if isinstance(row, dict) else {"prompt": row[0], "completion": row[1]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return add_dataset(path)


def numbered(tmp_path: Path, name: str, count: int) -> DatasetVersion:
    return stored(tmp_path, name, *((f"{name} {number}", "x") for number in range(count)))


# Differences


def test_rows_added_removed_and_changed_are_told_with_their_lines(tmp_path: Path) -> None:
    before = stored(tmp_path, "a", ("same", "1"), ("gone", "1"), ("other answer", "before this"))
    after = stored(tmp_path, "b", ("new", "1"), ("other answer", "before that"), ("same", "1"))
    changes = compare_versions(before, after)
    assert (changes.before, changes.after) == (before.reference, after.reference)
    assert (changes.same, changes.added, changes.removed, changes.changed) == (1, 1, 1, 1)
    first = {name: [(row.before, row.after, row.text) for row in rows] for name, rows in changes.first.items()}
    assert first == {
        "changed": [(3, 2, "other answer | before this → other answer | before that")],
        "removed": [(2, None, "gone | 1")],
        "added": [(None, 1, "new | 1")],
    }


def test_order_and_further_columns_are_no_difference_and_repeats_are(tmp_path: Path) -> None:
    before = stored(tmp_path, "a", ("a", "1"), ("b", "2"))
    after = stored(tmp_path, "b", ("b", "2"), {"prompt": "a", "completion": "1", "id": 7}, ("b", "2"))
    changes = compare_versions(before, after)
    assert (changes.same, changes.added, changes.removed, changes.changed) == (2, 1, 0, 0)
    back = compare_versions(after, before)
    assert (back.same, back.added, back.removed, back.changed) == (2, 0, 1, 0)


def test_long_texts_are_shown_where_they_differ(tmp_path: Path) -> None:
    before = stored(tmp_path, "a", ("a", "x" * 500 + "THIS" + "y" * 500))
    after = stored(tmp_path, "b", ("a", "x" * 500 + "THAT" + "y" * 500))
    text = compare_versions(before, after).first["changed"][0].text
    assert "xTHISy" in text
    assert "xTHATy" in text
    assert len(text) < 300


# Mixes


def origins(version: DatasetVersion) -> list[str]:
    lines = version.path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["extra"]["dataset"].split("@")[0] for line in lines]


def test_mix_takes_rows_in_proportion_spread_evenly(tmp_path: Path) -> None:
    parents = {name: numbered(tmp_path, name, count) for name, count in (("a", 300), ("b", 100), ("c", 40))}
    mixed = mix_datasets({"a": 3, "b": 1, parents["c"].reference: 0.5}, "mixed", seed=7)
    # c gives the fewest rows for its weight: 40 of them stand for 0.5.
    assert [(part.reference, part.weight, part.rows) for part in mixed.parents] == [
        (parents["a"].reference, 3, 240),
        (parents["b"].reference, 1, 80),
        (parents["c"].reference, 0.5, 40),
    ]
    assert (mixed.seed, mixed.rows, mixed.kind, mixed.report.duplicate_rows) == (7, 360, "chat", 0)
    for start in range(0, 360, 36):
        assert Counter(origins(mixed)[start : start + 36]) == {"a": 24, "b": 8, "c": 4}
    assert find_dataset("mixed") == mixed
    assert find_dataset("mixed").parents == mixed.parents


def test_mix_is_repeatable_and_follows_the_seed(tmp_path: Path) -> None:
    numbered(tmp_path, "a", 50)
    numbered(tmp_path, "b", 50)
    mixes = [mix_datasets({"a": 1, "b": 1}, "mixed", 20, seed) for seed in (1, 1, 2)]
    assert mixes[0] == mixes[1]
    assert mixes[0].digest != mixes[2].digest
    assert len(list_datasets()) == 4


def test_mix_repeats_rows_only_when_told(tmp_path: Path) -> None:
    numbered(tmp_path, "a", 10)
    numbered(tmp_path, "b", 100)
    with pytest.raises(UserError, match="without repeating rows this mix has at most 20") as caught:
        mix_datasets({"a": 1, "b": 1}, "mixed", 50)
    assert caught.value.field == "rows"
    mixed = mix_datasets({"a": 1, "b": 1}, "mixed", 50, repeat=True)
    lines = [json.loads(line) for line in mixed.path.read_text().splitlines()]
    times = Counter(Counter(row["messages"][0]["content"] for row in lines).values())
    # 25 rows of 10: each twice, and five of them three times.
    assert times == {1: 25, 2: 5, 3: 5}


def test_equal_rows_do_not_upset_the_count_of_a_mix(tmp_path: Path) -> None:
    stored(tmp_path, "a", *[("same", "x")] * 8)
    numbered(tmp_path, "b", 3)
    assert mix_datasets({"a": 1, "b": 1}, "mixed").rows == 6


def test_mixed_rows_keep_line_and_columns_of_their_own(tmp_path: Path) -> None:
    stored(tmp_path, "a", {"prompt": "1", "completion": "x", "id": 7})
    parent = stored(tmp_path, "b", ("2", "x"))
    row, other = mix_datasets({"a": 1, "b": 1}, "mixed").path.read_text().splitlines()
    assert json.loads(row)["extra"]["id"] == 7
    assert json.loads(other)["extra"] == {"dataset": parent.reference}
    again = mix_datasets({"mixed": 1, "a": 0.5}, "again")
    assert origins(again) == ["a", "b", "a"]


def test_images_of_mixed_rows_go_with_them(tmp_path: Path) -> None:
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
        stored(tmp_path, name, {"image": f"{name}.png", "caption": colour}, {"image": f"{name}.png", "caption": "?"})
    mixed = mix_datasets({"a": 1, "b": 1}, "mixed", 2)
    rows = [json.loads(line) for line in mixed.path.read_text().splitlines()]
    assert [row["extra"]["dataset"][0] for row in rows] == ["a", "b"]
    for row in rows:
        image = (mixed.path.parent / row["image"]).read_bytes()
        assert image == (tmp_path / f"{row['extra']['dataset'][0]}.png").read_bytes()
    assert mixed.report.images == 2


@pytest.mark.parametrize(
    ("weights", "rows", "words"),
    [
        ({"a": 1.0}, None, "two datasets at least"),
        ({"a": 1.0, "b": 0.0}, None, "weight is impossible"),
        ({"a": 1.0, "b": float("inf")}, None, "weight is impossible"),
        ({"a": 1.0, "gone": 1.0}, None, "no dataset 'gone'"),
        ({"a": 1.0, "pairs": 1.0}, None, "conversations, and pairs@"),
        ({"a": 1000.0, "b": 1.0}, 5, "of b no row would be in the mix"),
    ],
)
def test_impossible_mix_is_refused_and_leaves_nothing(
    tmp_path: Path, weights: dict[str, float], rows: int | None, words: str, home: Path
) -> None:
    numbered(tmp_path, "a", 5)
    numbered(tmp_path, "b", 5)
    stored(tmp_path, "pairs", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(UserError, match=words):
        mix_datasets(weights, "mixed", rows)
    assert sorted(folder.name for folder in (home / "datasets").iterdir()) == ["a", "b", "pairs"]

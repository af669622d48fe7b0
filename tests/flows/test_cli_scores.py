"""`tuneline evaluate` as it is used: one model, several side by side, five rows first, a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat_servers import chat_server
from tests.flows.command_line import files_below, printed, read_json, tuneline
from tests.tiny_models import make_tiny_chat_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scores")
    for name, seed in (("one", 1), ("two", 2)):
        make_tiny_chat_model(root / name, seed=seed)
    rows = [
        {"prompt": f"light {number}", "completion": f"on {number}", "room": f"r{number % 2}"} for number in range(7)
    ]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def evaluate(place: Path, *arguments: str, **options: Any) -> Any:
    command = ("evaluate", *arguments, "--dataset", "test.jsonl", "--max-new-tokens", "4")
    return tuneline(*command, home=place / "home", cwd=place, seconds=300, **options)


@pytest.mark.lifecycle
def test_two_models_side_by_side_with_a_judge_and_one_that_fails(place: Path) -> None:
    broken = place / "broken"
    broken.mkdir()
    for file in (place / "one").iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"no weights")
    with chat_server(lambda _: "Score: 3") as wise:
        (place / "judge.yaml").write_text(f"address: {wise.address}\nmodel: wise\nkey_variable: MY_KEY\n")
        done = evaluate(
            place, "one", "two", "broken", "--judge", "judge.yaml", "-o", "report", "--by", "room",
            extra={"MY_KEY": "a-secret"},
        )  # fmt: skip
    assert done.returncode == 1, done.stderr  # one of them failed
    assert set(wise.keys) == {"Bearer a-secret"}
    assert len(wise.asked) == 14
    for text in ("broken failed", "McNemar p", "By wise", "best by F1", "report/report.html", "report/rows.csv"):
        assert text in done.stdout, done.stdout
    assert "judge: 3.0" in (place / "report" / "report.html").read_text(encoding="utf-8")
    for file in (place / "report").iterdir():
        assert "a-secret" not in file.read_text(encoding="utf-8")
    for name in files_below(place / "home"):
        assert b"a-secret" not in (place / "home" / name.rpartition(" ")[0]).read_bytes()


@pytest.mark.lifecycle
def test_a_preview_in_a_script_shows_five_rows_and_stops(place: Path, tmp_path: Path) -> None:
    done = printed(evaluate(place, "one", "two", "--preview"))
    assert "5. light 4" in done
    assert "6. light 5" not in done
    assert done.count("expected: on") == 5
    assert "without --preview all 7 rows" in done


@pytest.mark.lifecycle
def test_one_model_by_slice_with_its_perplexity(place: Path) -> None:
    found = read_json(evaluate(place, "one", "--by", "room", "--perplexity", "--json"))
    assert found["perplexity"] > 1
    assert {value: part["rows"] for value, part in found["slices"]["room"].items()} == {"r0": 4, "r1": 3}
    done = evaluate(place, "one", "--metric", "nothing")
    assert done.returncode == 2
    assert "rouge_l" in done.stderr

"""Prompts to be answered in training: what is one, which are too long, how long an answer may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.toolkit import chat, prompt_rows
from tasks.stages import EventTail
from tests.methods.stage_jobs import open_job, training_job


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five rows: of two turns, with a system message, with a long question, and two plain ones."""
    path = tmp_path / "rows.jsonl"
    conversations = [
        [("user", "on"), ("assistant", "yes"), ("user", "off"), ("assistant", "no")],
        [("system", "be short"), ("user", "on"), ("assistant", "yes")],
        [("user", "kitchen " * 80), ("assistant", "long")],
        [("user", "light"), ("assistant", "a")],
        [("user", "hall"), ("assistant", "b")],
    ]
    with path.open("w", encoding="utf-8") as file:
        for line, turns in enumerate(conversations, start=1):
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"line": line, "messages": messages}) + "\n")
    return path


class Prepared:
    """The prompts of a job with these hyper-parameters."""

    def __init__(self, folder: Path, base: Path, rows: Path, **hyper: Any) -> None:
        self.job = open_job(folder, training_job(folder, base, rows, validation=rows, **hyper))
        self.tokenizer, _ = chat.load_tokenizer(str(base))
        self.train, self.validation = prompt_rows.prepare_prompts(self.job, self.tokenizer)
        self.report = json.loads((folder / "rows.json").read_text())

    @property
    def warnings(self) -> list[str]:
        events = EventTail(self.job.folder / contract.EVENTS_FILE).read()
        return [event["text"] for event in events if event["type"] == "warning"]


def test_a_prompt_is_what_stands_before_the_last_answer(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    found = Prepared(tmp_path / "job", tiny_model, rows)
    first = found.train[0]
    assert [message["content"] for message in first["prompt"]] == ["on", "yes", "off"]
    assert (first["reference"], first["line"]) == ("no", 1)
    assert first["length"] == len(chat.render_prompt(found.tokenizer, first["prompt"]))
    assert [message["role"] for message in found.train[1]["prompt"]] == ["system", "user"]
    assert found.train["reference"][:] == found.validation["reference"][:] == ["no", "yes", "long", "a", "b"]
    assert {found.report[split]["kept"] for split in ("train", "validation")} == {5}
    assert "supervised_tokens" not in found.report["train"]
    assert found.warnings == []


def test_prompts_over_the_limit_are_left_out_cut_or_refused(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    dropped = Prepared(tmp_path / "drop", tiny_model, rows, max_input_length=60)
    assert dropped.train["line"][:] == [1, 2, 4, 5]
    assert dropped.report["train"]["dropped_over_length"] == 1
    assert "line 3 dropped" in dropped.warnings[0]
    assert "max_input_length is 60" in dropped.warnings[0]

    cut = Prepared(tmp_path / "cut", tiny_model, rows, max_input_length=60, over_length="truncate")
    assert cut.train["line"][:] == [1, 2, 3, 4, 5]
    assert 50 < cut.train[2]["length"] <= 60
    assert cut.report["train"]["truncated"] == 1
    assert cut.train[2]["prompt"][-1]["content"].startswith("kitchen kitchen")

    with pytest.raises(contract.Refused, match=r"line 3: .* max_input_length is 60"):
        Prepared(tmp_path / "error", tiny_model, rows, max_input_length=60, over_length="error")
    with pytest.raises(contract.Refused, match="nothing to train on: of 5 prompts 5 are over a length limit"):
        Prepared(tmp_path / "none", tiny_model, rows, max_input_length=3)


def test_the_sequence_length_leaves_room_for_the_answer(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    found = Prepared(tmp_path / "job", tiny_model, rows, max_seq_length=100, max_content_length=40)
    assert prompt_rows.prompt_limit(found.job.parameters) == 60
    assert found.train["line"][:] == [1, 2, 4, 5]
    assert "max_seq_length leaves it 60" in found.warnings[0]


@pytest.mark.parametrize(
    ("hyper", "prompt", "answer"),
    [
        ({"max_seq_length": 100}, 50, 50),
        ({"max_seq_length": 100, "max_content_length": 20}, 80, 20),
        ({"max_seq_length": 100, "max_content_length": 100}, 50, 70),
        ({"max_seq_length": 100, "max_input_length": 100}, 99, 50),
        ({"max_seq_length": 100, "max_input_length": 40, "max_content_length": 50}, 40, 50),
    ],
)
def test_lengths_of_prompt_and_answer(
    tiny_model: Path, rows: Path, tmp_path: Path, hyper: dict[str, Any], prompt: int, answer: int
) -> None:
    job = open_job(tmp_path / "job", training_job(tmp_path / "job", tiny_model, rows, **hyper))
    assert prompt_rows.prompt_limit(job.parameters) == prompt
    assert prompt_rows.answer_limit(job, 30) == answer
    events = EventTail(job.folder / contract.EVENTS_FILE).read()
    assert any("answers are cut at 70 tokens" in event.get("text", "") for event in events) is (
        hyper.get("max_content_length") == 100
    )


def test_the_number_of_prompts_is_limited(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    assert len(Prepared(tmp_path / "job", tiny_model, rows, max_samples=2).train) == 2

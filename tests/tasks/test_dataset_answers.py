"""What a row says of an answer beside its text: the thought before it, and whether it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from tasks.datasets import add_dataset, check_dataset

ASKED = {"role": "user", "content": "Hi"}


def stored(tmp_path: Path, *rows: Any) -> list[list[dict[str, Any]]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    kept = add_dataset(file, "answers").path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in kept]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_thought_of_an_answer_is_kept(home: Path, tmp_path: Path, name: str) -> None:
    found = stored(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": "Hello", name: "greet back"}]})
    assert found == [[ASKED, {"role": "assistant", "content": "Hello", "reasoning_content": "greet back"}]]


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [("weight", 0, 1), ("loss", False, True), ("loss_weight", 0.0, 1.0), ("train", False, True), ("trainable", 0, 1)],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_an_answer_that_is_not_to_be_trained_is_stored_so(
    home: Path, tmp_path: Path, keys: tuple[str, str], name: str, off: object, on: object
) -> None:
    role, content = keys
    user, assistant = ("user", "assistant") if role == "role" else ("human", "gpt")
    talk = [
        {role: user, content: "Hi", name: off},
        {role: assistant, content: "WRONG", name: off},
        {role: user, content: "Again"},
        {role: assistant, content: "Right", name: on},
    ]
    found = stored(tmp_path, {"messages" if role == "role" else "conversations": talk})
    assert [message.get("weight") for message in found[0]] == [None, 0, None, None]


def test_qianfan_turns_keep_their_weights(home: Path, tmp_path: Path) -> None:
    turns = [{"prompt": "a", "response": [["b"]], "weight": 0}, {"prompt": "c", "response": [["d"]], "weight": 1}]
    found = stored(tmp_path, turns, turns)
    assert [[message.get("weight") for message in row] for row in found] == [[None, 0, None, None]] * 2


def test_a_weight_between_is_refused_by_line_and_field(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.jsonl"
    row = {"messages": [ASKED, {"role": "assistant", "content": "Hello", "weight": 0.5}]}
    file.write_text(json.dumps(row) + "\n")
    problem = check_dataset(file).problems[0]
    assert (problem.line, problem.field, problem.found) == (1, "messages[1].weight", "the number 0.5")
    with pytest.raises(UserError):
        add_dataset(file, "half")

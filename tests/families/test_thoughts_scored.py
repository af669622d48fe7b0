"""A tiny Qwen3 that has learned four answers by heart, with and without thoughts: each is scored as correct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.families.family_models import BY_NAME, make_model
from tests.flows.command_line import printed, read_json, tuneline

pytestmark = pytest.mark.families

ROOMS = ("kitchen", "hall", "cellar", "attic")


def write_rows(path: Path, *, thoughts: bool) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"switch the light in the {room} on"},
                {
                    "role": "assistant",
                    "content": f"{room} on",
                    **({"reasoning_content": f"It is the {room}."} if thoughts else {}),
                },
            ]
        }
        for room in ROOMS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("thoughts", [False, True], ids=["without", "with"])
def test_correct_answers_are_scored_as_correct(tmp_path: Path, thoughts: bool) -> None:
    make_model(BY_NAME["Qwen3"], tmp_path / "qwen3")
    write_rows(tmp_path / "rows.jsonl", thoughts=thoughts)
    content = {
        "name": "byheart",
        "base_model": "qwen3",
        "dataset": "rows.jsonl",
        "max_new_tokens": 48,
        "hyperparameters": {
            "lora_rank": 16,
            "max_steps": 40,
            "batch_size": 4,
            "learning_rate": 0.01,
            "max_seq_length": 128,
            "lr_scheduler": "constant",
            "dtype": "float32",
        },
    }
    (tmp_path / "byheart.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    def run(*arguments: str) -> Any:
        return tuneline(*arguments, home=tmp_path / "home", cwd=tmp_path, seconds=900)

    printed(run("train", "byheart.yaml"))
    name = read_json(run("trains", "list", "--json"))[0]["model"]
    found = read_json(run("evaluate", name, "--dataset", "rows.jsonl", "--max-new-tokens", "48", "--json"))
    assert found["rows"] == len(ROOMS)
    assert found["accuracy"] == 100.0

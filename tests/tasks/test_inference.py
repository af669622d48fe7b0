"""Answers of a model outside a train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tasks.inference import Generation, answer_prompts
from tasks.models import find_model


def test_answers_remove_what_a_killed_process_left_and_nothing_of_a_living_one(home: Path, tiny_model: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living = home / f"inference-{ended.pid}-abc", home / f"inference-{os.getpid()}-abc"
    for folder in (left, living):
        folder.mkdir(parents=True)
    model = find_model(str(tiny_model))
    (answer,) = answer_prompts(model, [[{"role": "user", "content": "on"}]], Generation(max_new_tokens=2))
    assert answer.tokens <= 2
    assert list(home.glob("inference-*")) == [living]

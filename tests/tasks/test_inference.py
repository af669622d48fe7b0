"""Answers of a model outside a train."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.datasets import add_dataset
from tasks.evaluation import evaluate, read_rows
from tasks.inference import Generation, answer_prompts, answer_requests
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


def test_perplexity_is_that_of_the_references_over_all_tokens(home: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"light {number}", "completion": "on " * (number + 1)} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    version = add_dataset(tmp_path / "rows.jsonl")
    model, generation = find_model(str(tiny_model)), Generation(max_new_tokens=2)
    asked = [row["messages"] for row in read_rows(version.path, -1)]
    requests = [{"messages": each[:-1], "reference": each[-1]["content"]} for each in asked]
    told = answer_requests(model, requests, generation)
    tokens = sum(answer["reference_tokens"] for answer in told)
    likelihood = sum(answer["reference_logprob"] for answer in told)
    found = evaluate(model, version, generation, perplexity=True)
    assert found.perplexity == pytest.approx(math.exp(-likelihood / tokens))
    assert found.figures["perplexity"] == found.perplexity > 1
    assert evaluate(model, version, generation).perplexity is None

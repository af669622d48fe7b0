"""Loads a reward model for an inference stage; scores the answers of its requests, or measures it on stored rows."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.toolkit import chat, hardware, models, preference_rows, scoring


def score_customized(job: contract.Job) -> dict[str, object]:
    """Score with `inputs.adapter` on top of `inputs.base_model`; returns the result of the stage."""
    return _score(job, job.inputs["base_model"], job.inputs["adapter"])


def score_complete(job: contract.Job) -> dict[str, object]:
    """Score with `inputs.model`, a complete model, or a base whose scores are by chance; returns the result."""
    return _score(job, job.inputs["model"], None)


def _score(job: contract.Job, base: str, adapter: str | None) -> dict[str, object]:
    hardware.warn_of_emulation(job, hardware.inference_device())
    job.phase("loading the model")
    torch.manual_seed(job.seed)  # a base model has no head: its scores are by chance, and the same each time
    tokenizer = chat.job_tokenizer(job, adapter or base)
    model = models.load_with_adapter(base, adapter, job.parameters["dtype"], models.load_scorer)
    job.phase("scoring")
    if "evaluation_rows" in job.inputs:
        return _measure_rows(job, model, tokenizer)
    return _score_requests(job, model, tokenizer)


def _score_requests(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """Score `inputs.requests` (JSON lines with `prompt` and `answers`) into `predictions.jsonl`, one line a request."""
    with Path(job.inputs["requests"]).open(encoding="utf-8", newline="\n") as lines:
        requests = [json.loads(line) for line in lines]
    started = time.monotonic()
    scores = _scores(job, model, tokenizer, [(each["prompt"], each["answers"]) for each in requests])
    path = job.output / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"scores": each}) + "\n" for each in scores)
    return {
        "predictions": str(path),
        "rows": len(scores),
        "answers": sum(map(len, scores)),
        "seconds": time.monotonic() - started,
    }


def _measure_rows(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """The share of pairs of stored rows that the model ranks right, and how much higher it scores the better ones."""
    pairs = list(preference_rows.read_pairs(Path(job.inputs["evaluation_rows"]), -1, "all"))
    conversations = [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    scores = _score_all(job, model, tokenizer, conversations)
    margins = [better - worse for better, worse in zip(scores[::2], scores[1::2], strict=True)]
    figures = {
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }
    return {"figures": figures, "pairs": len(pairs)}


def _scores(
    job: contract.Job, model: Any, tokenizer: Any, asked: Sequence[tuple[list[chat.Message], list[str]]]
) -> list[list[float]]:
    """The scores of the answers to each prompt."""
    conversations = [
        [*prompt, {"role": "assistant", "content": answer}] for prompt, answers in asked for answer in answers
    ]
    scores = iter(_score_all(job, model, tokenizer, conversations))
    return [[next(scores) for _ in answers] for _, answers in asked]


def _score_all(job: contract.Job, model: Any, tokenizer: Any, conversations: list[list[chat.Message]]) -> list[float]:
    def on_progress(done: int) -> None:
        job.progress(done, len(conversations))
        if job.cancelled:
            raise contract.Cancelled

    return scoring.score_conversations(
        model, tokenizer, conversations, batch_size=job.parameters["batch_size"], on_progress=on_progress
    )

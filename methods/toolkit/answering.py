"""Answers the requests of an inference job, one result line a request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.toolkit.chat import render_prompt
from methods.toolkit.generating import Answer, Sampling, generate, record
from methods.toolkit.likelihood import Likelihood, answer_likelihoods


def answer_requests(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """Answer `inputs.requests` (JSON lines with `messages`) into `predictions.jsonl` of the job's output folder.

    Each result line has `answer`, `tokens`, `hit_limit` and `prompt_token_ids`; that of a request with a `reference`
    has `reference_logprob` and `reference_tokens` as well. Returns the path, counts, seconds, and in `generation` the
    settings that the answers were made with.
    """
    requests = read_requests(job)
    prompts = [render_prompt(tokenizer, request["messages"]) for request in requests]
    torch.manual_seed(job.seed)
    expected = {
        index: [*request["messages"], {"role": "assistant", "content": request["reference"]}]
        for index, request in enumerate(requests)
        if "reference" in request
    }
    on_progress = progress_of(job, len(prompts) + len(expected))
    started = time.monotonic()
    answers = generate(
        model,
        tokenizer,
        prompts,
        sampling_of(job),
        batch_size=job.parameters["batch_size"],
        on_progress=on_progress,
    )
    found = answer_likelihoods(
        model, tokenizer, list(expected.values()), on_progress=lambda done: on_progress(len(prompts) + done)
    )
    return {
        **write_predictions(job, prompts, answers, started, dict(zip(expected, found, strict=True))),
        "generation": record(model, sampling_of(job)),
    }


def read_requests(job: contract.Job) -> list[dict[str, Any]]:
    """The requests of the job, in order."""
    # Lines end at a newline only: str.splitlines would also cut inside a message at U+2028 or U+0085.
    with Path(job.inputs["requests"]).open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def sampling_of(job: contract.Job) -> Sampling:
    """How the job wants its answers made."""
    p = job.parameters
    kept = tuple(p.get("model_settings", ()))
    return Sampling(p["max_new_tokens"], p["temperature"], p["top_p"], p["top_k"], kept)


def progress_of(job: contract.Job, total: int) -> Callable[[int], None]:
    """Tells how much of the work is done, and raises Cancelled once the job is to stop."""

    def on_progress(done: int) -> None:
        job.progress(done, total)
        if job.cancelled:
            raise contract.Cancelled

    return on_progress


def write_predictions(
    job: contract.Job,
    prompts: list[list[int]],
    answers: list[Answer],
    started: float,
    likelihoods: Mapping[int, Likelihood],
) -> dict[str, object]:
    """Write the answers as `answer_requests` says, with the likelihoods of some references, by their position.

    `started` is a reading of `time.monotonic`. Returns what the stage returns.
    """
    path = job.output / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = {
                "answer": answer.text,
                "tokens": answer.tokens,
                "hit_limit": answer.hit_limit,
                "prompt_token_ids": prompt,
            }
            if index in likelihoods:
                row |= {"reference_logprob": likelihoods[index].logprob, "reference_tokens": likelihoods[index].tokens}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "predictions": str(path),
        "rows": len(answers),
        "hit_limit": sum(answer.hit_limit for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": time.monotonic() - started,
    }

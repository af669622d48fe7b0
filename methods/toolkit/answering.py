"""Answers the requests of an inference job, one result line a request."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.toolkit.chat import render_prompt
from methods.toolkit.generating import Sampling, generate
from methods.toolkit.likelihood import answer_likelihoods


def answer_requests(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """Answer `inputs.requests` (JSON lines with `messages`) into `predictions.jsonl` of the job's output folder.

    Each result line has `answer`, `tokens`, `hit_limit` and `prompt_token_ids`; that of a request with a `reference`
    has `reference_logprob` and `reference_tokens` as well. Returns the path, counts, seconds.
    """
    # Lines end at a newline only: str.splitlines would also cut inside a message at U+2028 or U+0085.
    with Path(job.inputs["requests"]).open(encoding="utf-8", newline="\n") as lines:
        requests = [json.loads(line) for line in lines]
    prompts = [render_prompt(tokenizer, request["messages"]) for request in requests]
    p = job.parameters
    sampling = Sampling(p["max_new_tokens"], p["temperature"], p["top_p"], p["top_k"])
    torch.manual_seed(job.seed)
    expected = {
        index: [*request["messages"], {"role": "assistant", "content": request["reference"]}]
        for index, request in enumerate(requests)
        if "reference" in request
    }

    def on_progress(done: int) -> None:
        job.progress(done, len(prompts) + len(expected))
        if job.cancelled:
            raise contract.Cancelled

    started = time.monotonic()
    answers = generate(
        model,
        tokenizer,
        prompts,
        sampling,
        batch_size=p["batch_size"],
        on_progress=on_progress,
    )
    found = answer_likelihoods(
        model, tokenizer, list(expected.values()), on_progress=lambda done: on_progress(len(prompts) + done)
    )
    likelihoods = dict(zip(expected, found, strict=True))
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

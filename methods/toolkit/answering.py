"""Answers the requests of an inference job, one result line a request."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from methods import contract
from methods.toolkit import hardware, tool_answers, tool_parsing
from methods.toolkit.chat import RenderError, render_prompt
from methods.toolkit.generating import Answer, Sampling, batch_by_memory, generate, record
from methods.toolkit.likelihood import Likelihood, answer_likelihoods
from methods.toolkit.memory import available_gib


def answer_requests(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """Answer `inputs.requests` (JSON lines with `messages`) into `predictions.jsonl` of the job's output folder.

    Each result line has `answer`, `tokens`, `hit_limit` and `prompt_token_ids`; that of an answer with a thought has
    `thought` and `said` (both together, as a server returns it), that of a request with a `reference` has
    `reference_logprob` and `reference_tokens` as well; a `reference` is a text, or a message with calls. That of a
    request with `tools` has `tool_calls` (name and arguments of each), `broken_calls` (how many are unreadable) and
    `content` (what is said beside them). Returns the path, counts, seconds, the tokens of the answers per second, how
    many were made at a time, and in `generation` the settings that they were made with. Raises Refused for a request
    that the chat template refuses.
    """
    requests = read_requests(job)
    prompts = [_prompt(tokenizer, number, request) for number, request in enumerate(requests, start=1)]
    torch.manual_seed(job.seed)
    expected = {
        index: [*request["messages"], _reference(request["reference"])]
        for index, request in enumerate(requests)
        if "reference" in request
    }
    on_progress = progress_of(job, len(prompts) + len(expected))
    batch_size = _batch_size(job, model, prompts)
    started = time.monotonic()
    answers = generate(
        model,
        tokenizer,
        prompts,
        sampling_of(job),
        batch_size=batch_size,
        on_progress=on_progress,
    )
    seconds = time.monotonic() - started
    found = answer_likelihoods(
        model,
        tokenizer,
        list(expected.values()),
        [requests[index].get("tools") for index in expected],
        on_progress=lambda done: on_progress(len(prompts) + done),
    )
    likelihoods = dict(zip(expected, found, strict=True))
    called = {
        index: tool_answers.read_calls(tokenizer, answer.marked, prompts[index], requests[index]["tools"])
        for index, answer in enumerate(answers)
        if requests[index].get("tools")
    }
    result = write_predictions(job, prompts, answers, started, likelihoods, called, answered_seconds=seconds)
    return {**result, "batch_size": batch_size, "generation": record(model, sampling_of(job))}


def _reference(reference: str | dict[str, Any]) -> dict[str, Any]:
    """The wanted answer as a message."""
    return {"role": "assistant", "content": reference} if isinstance(reference, str) else reference


def _batch_size(job: contract.Job, model: Any, prompts: list[list[int]]) -> int:
    """The rows answered at a time: what the job says, or as many as the free memory holds."""
    if not job.parameters.get("batch_size_by_memory", False) or not prompts:
        return int(job.parameters["batch_size"])
    longest = max(map(len, prompts))
    return batch_by_memory(model.config, model.dtype, longest, sampling_of(job), available_gib())


def _prompt(tokenizer: Any, number: int, request: dict[str, Any]) -> list[int]:
    try:
        return render_prompt(tokenizer, request["messages"], request.get("tools"))
    except RenderError as error:
        way_out = "Remove the row, or use a model whose template takes it."
        raise contract.Refused(f"row {number}: {error}. {way_out}") from error


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


class _Report(Protocol):
    def __call__(self, done: float, note: str = "", /) -> None: ...


def progress_of(job: contract.Job, total: int) -> _Report:
    """Tells how much of the work is done, in parts for what is under way; raises Cancelled once the job is to stop."""

    def on_progress(done: float, note: str = "", /) -> None:
        job.progress(int(done), total, done % 1, note)
        if job.cancelled:
            raise contract.Cancelled

    return on_progress


def write_predictions(
    job: contract.Job,
    prompts: list[list[int]],
    answers: list[Answer],
    started: float,
    likelihoods: Mapping[int, Likelihood],
    called: Mapping[int, tool_parsing.Parsed] | None = None,
    *,
    answered_seconds: float | None = None,
) -> dict[str, object]:
    """Write the answers as `answer_requests` says, with the likelihoods and calls of some, by their position.

    `started` is a reading of `time.monotonic`; `answered_seconds` were spent on the answers alone, if that is known.
    Returns what the stage returns.
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
            if answer.whole is not None:
                row |= {"thought": answer.thought, "said": answer.whole}
            if called and index in called:
                row |= {"tool_calls": called[index].calls, "broken_calls": called[index].broken}
                row["content"] = called[index].content
            if index in likelihoods:
                row |= {"reference_logprob": likelihoods[index].logprob, "reference_tokens": likelihoods[index].tokens}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    tokens, seconds = sum(answer.tokens for answer in answers), time.monotonic() - started
    return {
        "predictions": str(path),
        "rows": len(answers),
        "hit_limit": sum(answer.hit_limit for answer in answers),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(answered_seconds or seconds, 1e-9),
        "dtype": hardware.resolve_dtype(job.parameters["dtype"]),
    }

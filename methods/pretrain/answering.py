"""Goes on from texts as they are, or answers conversations by the chat template; or measures held-out documents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.pretrain import perplexity
from methods.toolkit import answering, chat, documents, generating, models


def answer(job: contract.Job, base: str, adapter: str | None) -> dict[str, object]:
    """Measure `inputs.evaluation_rows`, or answer `inputs.requests` into `predictions.jsonl`.

    A request has a `text` to go on from, or `messages`; the requests of a job are of one sort.
    """
    job.phase("loading the model")
    tokenizer = chat.job_tokenizer(job, adapter or base)
    model = models.load_with_adapter(base, adapter, job.parameters["dtype"])
    if "evaluation_rows" in job.inputs:
        job.phase("measuring")
        texts = [text for _, text in documents.read_texts(Path(job.inputs["evaluation_rows"]))]
        figures = perplexity.measure(model, tokenizer, texts, lambda total: answering.progress_of(job, total))
        return {"figures": figures, "documents": len(texts)}
    job.phase("answering")
    requests = answering.read_requests(job)
    if requests and "text" in requests[0]:
        return _go_on(job, model, tokenizer, [request["text"] for request in requests])
    return answering.answer_requests(job, model, tokenizer)


def _go_on(job: contract.Job, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, object]:
    prompts = [documents.prompt_ids(tokenizer, text) for text in texts]
    torch.manual_seed(job.seed)
    started = time.monotonic()
    answers = generating.generate(
        model,
        tokenizer,
        prompts,
        answering.sampling_of(job),
        batch_size=job.parameters["batch_size"],
        on_progress=answering.progress_of(job, len(prompts)),
    )
    return answering.write_predictions(job, prompts, answers, started, {})

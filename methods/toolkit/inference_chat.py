"""Loads a chat model for an inference stage and answers the requests of its job."""

from __future__ import annotations

from methods import contract
from methods.toolkit import answering, chat, models


def answer_customized(job: contract.Job) -> dict[str, object]:
    """Answer with `inputs.adapter` on top of `inputs.base_model`; returns the result of the stage."""
    return _answer(job, job.inputs["base_model"], job.inputs["adapter"])


def answer_complete(job: contract.Job) -> dict[str, object]:
    """Answer with `inputs.model`, a base or a complete model; returns the result of the stage."""
    return _answer(job, job.inputs["model"], None)


def _answer(job: contract.Job, base: str, adapter: str | None) -> dict[str, object]:
    job.phase("loading the model")
    tokenizer, _ = chat.load_tokenizer(adapter or base)
    model = models.load_with_adapter(base, adapter, job.parameters["dtype"])
    job.phase("answering")
    return answering.answer_requests(job, model, tokenizer)

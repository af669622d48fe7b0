"""Loads a chat model for an inference stage; answers the requests of its job, or measures it on pairs of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import answering, chat, hardware, likelihood, models, preference_rows


def answer_customized(job: contract.Job) -> dict[str, object]:
    """Answer with `inputs.adapter` on top of `inputs.base_model`; returns the result of the stage."""
    return _answer(job, job.inputs["base_model"], job.inputs["adapter"])


def answer_complete(job: contract.Job) -> dict[str, object]:
    """Answer with `inputs.model`, a base or a complete model; returns the result of the stage."""
    return _answer(job, job.inputs["model"], None)


def _answer(job: contract.Job, base: str, adapter: str | None) -> dict[str, object]:
    hardware.warn_of_emulation(job, hardware.inference_device())
    job.phase("loading the model")
    tokenizer = chat.job_tokenizer(job, adapter or base)
    model = models.load_with_adapter(base, adapter, job.parameters["dtype"])
    job.phase("answering")
    if "evaluation_rows" in job.inputs:
        return _measure_pairs(job, model, tokenizer)
    return answering.answer_requests(job, model, tokenizer)


def _measure_pairs(job: contract.Job, model: Any, tokenizer: Any) -> dict[str, object]:
    """How the model itself judges stored pairs of answers: which one of two it finds likelier, and by how much.

    `preference_accuracy`: share of pairs whose better answer is the likelier one. `preference_margin`: mean difference
    of the two log-likelihoods, in nats; what training adds to it is the margin of DPO's rewards, over beta.
    """
    pairs = list(preference_rows.read_pairs(Path(job.inputs["evaluation_rows"]), -1))
    conversations = [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    tools = [pair.tools for pair in pairs for _ in range(2)]

    def on_progress(done: int) -> None:
        job.progress(done, len(conversations))
        if job.cancelled:
            raise contract.Cancelled

    found = likelihood.answer_likelihoods(model, tokenizer, conversations, tools, on_progress=on_progress)
    margins = [better.logprob - worse.logprob for better, worse in zip(found[::2], found[1::2], strict=True)]
    figures = {
        "preference_accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "preference_margin": sum(margins) / len(margins),
    }
    return {"figures": figures, "pairs": len(pairs)}

"""Answers prompts with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import answering, chat, models


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder; returns where the answers lie."""
    job.phase("loading the model")
    tokenizer, _ = chat.load_tokenizer(job.inputs["model"])
    model = models.load_with_adapter(job.inputs["model"], None, job.parameters["dtype"])
    job.phase("answering")
    return answering.answer_requests(job, model, tokenizer)


if __name__ == "__main__":
    contract.run(main)

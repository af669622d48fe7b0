"""Answers prompts with a customized model: the base with its adapter on top.

Run as: python inference_customized.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import answering, chat, models


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder; returns where the answers lie."""
    job.phase("loading the model")
    tokenizer, _ = chat.load_tokenizer(job.inputs["adapter"])
    model = models.load_with_adapter(job.inputs["base_model"], job.inputs["adapter"], job.parameters["dtype"])
    job.phase("answering")
    return answering.answer_requests(job, model, tokenizer)


if __name__ == "__main__":
    contract.run(main)

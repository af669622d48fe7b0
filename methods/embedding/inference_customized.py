"""Embeds texts, or measures held-out rows, with a customized model: the base with its adapter on top.

Run as: python inference_customized.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.embedding import answering, encoders
from methods.toolkit import hardware


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder, or measure its rows; returns where the vectors lie, or the figures."""
    hardware.warn_of_emulation(job, hardware.training_device())
    job.phase("loading the model")
    base, adapter = job.inputs["base_model"], job.inputs["adapter"]
    model = encoders.load_customized(base, adapter, job.parameters["dtype"], job.folder)
    return answering.answer(job, model)


if __name__ == "__main__":
    contract.run(main)

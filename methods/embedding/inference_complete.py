"""Embeds texts, or measures held-out rows, with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.embedding import answering, encoders
from methods.toolkit import hardware


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder, or measure its rows; returns where the vectors lie, or the figures."""
    hardware.warn_of_emulation(job, hardware.training_device())
    job.phase("loading the model")
    model = encoders.load_encoder(job.inputs["model"], job.parameters["dtype"])
    return answering.answer(job, model)


if __name__ == "__main__":
    contract.run(main)

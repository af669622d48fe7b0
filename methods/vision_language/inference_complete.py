"""Answers prompts with images with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import hardware, vision_answering, vision_models
from methods.toolkit.vision_rows import load_renderer


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder; returns where the answers lie."""
    hardware.warn_of_emulation(job, hardware.inference_device())
    job.phase("loading the model")
    renderer = load_renderer(job.inputs["model"])
    model = vision_models.load_with_adapter(job.inputs["model"], None, job.parameters["dtype"])
    job.phase("answering")
    return vision_answering.answer_requests(job, model, renderer)


if __name__ == "__main__":
    contract.run(main)

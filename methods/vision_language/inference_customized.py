"""Answers prompts with images with a customized model: the base with its adapter on top.

Run as: python inference_customized.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import hardware, vision_answering, vision_models
from methods.toolkit.vision_rows import load_renderer


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder; returns where the answers lie."""
    hardware.warn_of_emulation(job, hardware.inference_device())
    job.phase("loading the model")
    adapter = job.inputs["adapter"]
    renderer = load_renderer(adapter)
    model = vision_models.load_with_adapter(job.inputs["base_model"], adapter, job.parameters["dtype"])
    job.phase("answering")
    return vision_answering.answer_requests(job, model, renderer)


if __name__ == "__main__":
    contract.run(main)

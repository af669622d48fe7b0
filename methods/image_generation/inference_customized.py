"""Makes pictures with a customized model: the base with its LoRA on top.

Run as: python inference_customized.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.image_generation import answering, pictures


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder, or measure the model; returns where the pictures lie, or the figures."""
    job.phase("loading the model")
    adapter = job.inputs["adapter"]
    pipeline = pictures.load_pipeline(job.inputs["base_model"], adapter, job.parameters["dtype"])
    job.phase("painting")
    return answering.answer(job, pipeline, pictures.read_settings(adapter))


if __name__ == "__main__":
    contract.run(main)

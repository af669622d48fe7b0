"""Makes pictures with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.image_generation import answering, pictures


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder, or measure the model; returns where the pictures lie, or the figures."""
    job.phase("loading the model")
    pipeline = pictures.load_pipeline(job.inputs["model"], None, job.parameters["dtype"])
    job.phase("painting")
    return answering.answer(job, pipeline, pictures.read_settings(job.inputs["model"]))


if __name__ == "__main__":
    contract.run(main)

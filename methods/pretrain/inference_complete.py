"""Goes on from texts, answers prompts or measures documents with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.pretrain import answering


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder, or measure its rows; returns where the answers lie, or the figures."""
    return answering.answer(job, job.inputs["model"], None)


if __name__ == "__main__":
    contract.run(main)

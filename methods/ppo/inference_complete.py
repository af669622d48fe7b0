"""Answers prompts with a self-contained model: a base or a complete one.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import inference_chat


def main(job: contract.Job) -> dict[str, object]:
    """Answer the requests of the job folder; returns where the answers lie."""
    return inference_chat.answer_complete(job)


if __name__ == "__main__":
    contract.run(main)

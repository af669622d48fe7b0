"""Scores answers with a customized reward model: the base with its adapter and head on top.

Run as: python inference_customized.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import inference_reward


def main(job: contract.Job) -> dict[str, object]:
    """Score the requests of the job folder, or measure the model on evaluation rows; returns the result."""
    return inference_reward.score_customized(job)


if __name__ == "__main__":
    contract.run(main)

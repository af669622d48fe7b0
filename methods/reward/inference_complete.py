"""Scores answers with a complete reward model.

Run as: python inference_complete.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import inference_reward


def main(job: contract.Job) -> dict[str, object]:
    """Score the requests of the job folder, or measure the model on evaluation rows; returns the result."""
    return inference_reward.score_complete(job)


if __name__ == "__main__":
    contract.run(main)

"""The training of the method grpo, with what its own form asks set for the sample data of this demo.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from typing import Any

from methods import contract
from methods.grpo import training

SETTINGS: dict[str, Any] = {
    "reward_model": None,
    "reward_file": None,
    "top_p": 1.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "num_iterations": 1,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "mask_truncated": False,
}
"""The parameters that grpo has and this method does not ask for."""


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    job.parameters = {**SETTINGS, **job.parameters}
    return training.main(job)


if __name__ == "__main__":
    contract.run(main)

"""The training of the method sft, whose form is filled in for the sample data of this demo.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.sft import training


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    return training.main(job)


if __name__ == "__main__":
    contract.run(main)

"""Makes the complete model of a train on documents: base and adapter merged, or the full weights; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

from methods import contract
from methods.toolkit import saving_chat


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    return saving_chat.save_and_verify(job)


if __name__ == "__main__":
    contract.run(main)

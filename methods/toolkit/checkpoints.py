"""Checkpoints of any engine."""

from __future__ import annotations

import shutil
from pathlib import Path

from methods import contract


def remove_torn_checkpoints(checkpoints: Path) -> None:
    """Remove what a kill left half-written."""
    whole = contract.complete_checkpoints(checkpoints)
    for path in checkpoints.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)

"""Inputs of public bug reports, where this machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest


def shared_case(case: str, file: str) -> Path:
    """A file of a case beside the repository; the test is skipped where it is absent."""
    for folder in Path(__file__).resolve().parents:
        path = folder / "shared" / "cases" / case / file
        if path.is_file():
            return path
    pytest.skip(f"shared/cases/{case} is not here")

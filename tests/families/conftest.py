"""Prints the table family × method once all cells have run, in this process or in several."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.families import table
from tests.families.cells import Cell

CELL_PROPERTY = "family_cell"
WRITE_VARIABLE = "FAMILIES_WRITE"
"""Set to 1, the documents get the table that ran, and no cell is compared with them."""


def writes_documents() -> bool:
    """Whether this run writes the documents' table."""
    return os.environ.get(WRITE_VARIABLE) == "1"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of the cells that ran; each came with the report of its test."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    told = [
        value for report in reports for name, value in getattr(report, "user_properties", ()) if name == CELL_PROPERTY
    ]
    cells = {(value["family"], value["case"]): Cell(**value) for value in told}
    if not cells:
        return
    text = table.markdown(list(cells.values()))
    terminalreporter.section("families × methods")
    terminalreporter.write_line(text)
    if writes_documents():
        for document in table.DOCUMENTS:
            table.write(document, text)


@pytest.fixture(scope="session")
def stages() -> Iterator[None]:
    """The stages' modules, loaded once and put out of the collector's sight.

    A cell collects garbage a dozen times; with the libraries' million objects that took half of its time.
    """
    from transformers import logging

    for method in ("sft", "dpo", "grpo", "reward", "peft"):
        import_module(f"methods.{method}.training")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

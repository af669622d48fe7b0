"""Texts that go with a model so that later stages can prove that it is still the same one."""

from __future__ import annotations

import json
from pathlib import Path

from methods import contract
from methods.embedding import rows

PROBES_FILE = "probes.json"
PROBE_ROWS = 4


def write_probes(folder: Path, train_rows: Path) -> None:
    """Store the texts of the first training rows, as requests to an inference stage."""
    kind, found = rows.read_rows(train_rows, PROBE_ROWS)
    requests = [{"request": {"texts": [row[column] for column in rows.COLUMNS[kind]]}} for row in found]
    contract.write_json(folder / PROBES_FILE, {"probes": requests})


def read_probes(folder: Path) -> list[str]:
    """The texts stored with a model. Raises Refused if there are none."""
    path = folder / PROBES_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))["probes"] if path.exists() else []
    if not stored:
        raise contract.Refused(f"{folder} holds no {PROBES_FILE}: the saved weights cannot be verified")
    return [text for probe in stored for text in probe["request"]["texts"]]

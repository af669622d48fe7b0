"""The real `tuneline` program, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("tuneline")


def program_environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without the settings of Tuneline, Prefect and MLflow, and with a home of its own."""
    others = ("TUNELINE_", "PREFECT_", "MLFLOW_", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    # A second thread only slows down models this small.
    return kept | {"TUNELINE_HOME": str(home), "OMP_NUM_THREADS": "1"} | dict(extra or {})


def tuneline(
    *arguments: str | Path, home: Path, cwd: Path, seconds: float = 120, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        cwd=cwd,
        env=program_environment(home, extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that worked has printed."""
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def read_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a command that worked has printed."""
    return json.loads(printed(done))


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, with its size; none if there is no folder."""
    return {f"{path.relative_to(folder)} {path.stat().st_size}" for path in folder.rglob("*") if path.is_file()}

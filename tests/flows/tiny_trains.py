"""An installation in a temporary folder with a tiny base model and a small dataset, and flows run on it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from configs.resolve import ResolvedTrain, resolve_train
from configs.settings import PROJECT_ROOT, Settings
from deployments.databases import mlflow_database_uri
from tests.postgres import own_databases
from tests.tiny_models import make_tiny_chat_model

ROOMS = ("kitchen", "hall", "cellar", "garden", "attic", "office", "bath")


@contextmanager
def installation(root: Path) -> Iterator[Settings]:
    """Point this process, and those it starts, at an installation of its own below `root`, with no server."""
    home = root / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELINE_HOME", str(home))
        patch.setenv("TUNELINE_GRACE_SECONDS", "30")
        patch.setenv("TUNELINE_GPU_LOCKS", str(root / "gpu-locks"))
        for name, value in own_databases().items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_database_uri(Settings(home=home)))
        patch.setenv("OMP_NUM_THREADS", "1")  # a model this small is only slowed down by a second thread
        (home / "mlflow").mkdir(parents=True)
        _write_rows(root)
        make_tiny_chat_model(root / "tiny", seed=1)
        yield Settings(home=home)


def _write_rows(root: Path) -> None:
    rows = [
        {"prompt": f"switch the light {number} in the {ROOMS[number * 5 % 7]}", "completion": f"on {number % 7}"}
        for number in range(60)
    ]
    for name, part in {"rows": rows[:48], "validation": rows[48:54], "test": rows[54:57]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")


def train_file(root: Path, name: str, *, hyper: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A train file on the tiny model: six short steps, a checkpoint every two."""
    content = {
        "name": name,
        "description": f"the train {name}",
        "base_model": str(root / "tiny"),
        "dataset": str(root / "rows.jsonl"),
        "max_new_tokens": 8,
        **fields,
        "hyperparameters": {
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 0.01,
            "checkpoint_steps": 2,
            "max_seq_length": 128,
            **(hyper or {}),
        },
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def resolved(root: Path, name: str, *, hyper: dict[str, Any] | None = None, **fields: Any) -> ResolvedTrain:
    """The checked configuration of `train_file`."""
    return resolve_train(train_file(root, name, hyper=hyper, **fields))


def start_flow(root: Path, flow: str, *arguments: str) -> subprocess.Popen[bytes]:
    """`python -m flows.FLOW ARGUMENTS` as a process of its own, in a process group of its own as in a terminal.

    Its output goes to `root/flow.log`: on a pipe, whatever it leaves behind would be waited for as well.
    """
    with (root / "flow.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"flows.{flow}", *arguments],
            cwd=PROJECT_ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], object], seconds: float = 60.0, every: float = 0.02) -> None:
    """Wait until the condition holds; AssertionError after three times the seconds of an idle machine."""
    deadline = time.monotonic() + 3 * seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


def processes_naming(text: str) -> list[psutil.Process]:
    """Every running process whose command line holds the text."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and any(text in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found

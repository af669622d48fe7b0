"""Runs a stage as a process of its own, follows its events, and owns it to its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from methods import contract, supervisor

EventHandler = Callable[[list[dict[str, Any]]], None]

_POLL_SECONDS = 0.25
_KEPT_FROM_STAGES = ("PREFECT_", "MLFLOW_", "TUNELINE_")


class StageJob(BaseModel):
    """What a stage is asked to do; written to `job.json`."""

    stage: str
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    output: Path
    resume_from: Path | None = None
    seed: int


class StageCancelled(Exception):
    """The stage was asked to stop, has saved a checkpoint if it could, and has ended."""


class StageFailed(Exception):
    """The stage ended without a result; the message names its log."""


class StageKilled(StageFailed):
    """The stage was ended from outside (a signal, the host's memory): worth another attempt."""


def run_stage(
    folder: Path, job: StageJob, python: Path, file: Path, grace_seconds: float, on_events: EventHandler
) -> dict[str, Any]:
    """Run a stage file to its end and return its result.

    `on_events` gets the new events, in order, a few times a second; what it raises does not stop the stage.
    Raises UserError for what the stage refused, StageCancelled, StageFailed.
    """
    prepare_folder(folder, job)
    with _lifeline(folder, python, file, grace_seconds) as process:
        tail = EventTail(folder / contract.EVENTS_FILE)
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                on_events(tail.read())
        except BaseException:
            # Cancelled from outside (Ctrl-C, Prefect, a timeout): the stage gets its grace to save a checkpoint.
            process.send_signal(signal.SIGTERM)
            process.wait(grace_seconds + 10)
            on_events(tail.read())
            raise
        on_events(tail.read())
    return _result(folder, process.returncode)


def prepare_folder(folder: Path, job: StageJob) -> None:
    """Write the job, and remove the result of an earlier attempt so that it cannot be taken for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    job.output.mkdir(parents=True, exist_ok=True)
    (folder / contract.RESULT_FILE).unlink(missing_ok=True)
    contract.write_json(folder / contract.JOB_FILE, job.model_dump(mode="json"))


class EventTail:
    """Reads the whole lines that were appended to an events file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def read(self, until: int | None = None) -> list[dict[str, Any]]:
        """The new events (up to a byte offset). A line that is no event, from a custom stage, becomes a warning."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read() if until is None else file.read(until - self.offset)
            whole, newline, _ = content.rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return [_parse(line) for line in whole.splitlines()] if newline else []


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
        return event
    except ValueError:
        text = f"not an event: {line[:200]!r}"
        return {"type": "warning", "time": time.time(), "text": text}


def signal_running(folder: Path) -> bool:
    """Ask the stage that runs in `folder` to stop; False if none runs."""
    import psutil

    try:
        content = json.loads((folder / supervisor.PROCESS_FILE).read_text())
        process = psutil.Process(content["supervisor"])
        # A process id is reused: only one that is older than the record is the supervisor we mean.
        if process.create_time() > content["started"] + 1:
            return False
        process.terminate()
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False
    return True


def stage_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a stage: ours without the servers' settings, which may hold credentials."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_KEPT_FROM_STAGES)}
    return kept | {
        "PYTHONPATH": str(PROJECT_ROOT),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }


@contextlib.contextmanager
def _lifeline(folder: Path, python: Path, file: Path, grace: float) -> Any:
    command = [
        sys.executable,
        "-S",
        supervisor.__file__,
        str(folder),
        str(grace),
        str(python),
        str(file),
        str(folder),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "supervisor.log").open("ab"),
        start_new_session=True,
        env=stage_environment(),
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(grace + 10)


def _result(folder: Path, code: int) -> dict[str, Any]:
    if code == supervisor.EXIT_IN_USE:
        raise UserError(
            "this stage is already running", file=folder, mend="wait for it, or `tuneline trains cancel` it"
        )
    path = folder / contract.RESULT_FILE
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("status") == "cancelled":
        raise StageCancelled
    if result.get("refused"):
        raise UserError(result["error"])
    if code != 0 or result.get("status") != "completed":
        raise _failure(folder / contract.LOG_FILE, result.get("error"), code)
    return result


def _failure(log: Path, error: str | None, code: int) -> StageFailed:
    end = f"The log is {log}; its end:\n{log_tail(log)}"
    if error is not None:
        return StageFailed(f"{error}\n{end}")
    if code > 128:
        hint = " (out of memory?)" if code - 128 == signal.SIGKILL else ""
        return StageKilled(f"the stage was ended by signal {code - 128}{hint}\n{end}")
    if code < 0:
        return StageKilled(f"the stage's supervisor was ended by signal {-code}\n{end}")
    return StageFailed(f"the stage ended with exit code {code} and left no result\n{end}")


def log_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

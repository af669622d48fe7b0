"""Runs a stage as a process of its own, follows its events, and owns it to its end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from methods import contract, supervisor
from methods.toolkit import remote_code
from tasks import cancelling
from tasks.files import last_lines
from tasks.gpus import slot_descriptors, stage_variables
from tasks.processes import STAGE_FOLDER_VARIABLE

EventHandler = Callable[[list[dict[str, Any]]], None]

_POLL_SECONDS = 0.25
# A killed process is gone from the list of processes a moment before it lets go of its files.
_LOCK_SECONDS = 1.0
_KEPT_FROM_STAGES = ("PREFECT_", "MLFLOW_", "TUNELINE_")
_GIVEN_TO_STAGES = ("TUNELINE_NATIVE_BFLOAT16",)  # methods.toolkit.hardware reads it in the stage


class StageJob(BaseModel):
    """What a stage is asked to do; written to `job.json`."""

    stage: str
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    output: Path
    resume_from: Path | None = None
    seed: int


class _Event(BaseModel):
    time: float


class _Metrics(_Event):
    type: Literal["metrics"]
    step: int
    values: dict[str, float]


class _Progress(_Event):
    type: Literal["progress"]
    step: int
    total: int
    part: float = Field(default=0.0, ge=0, le=1)
    note: str = ""


class _Phase(_Event):
    type: Literal["phase"]
    name: str


class _Resolved(_Event):
    type: Literal["resolved"]
    name: str
    value: str
    origin: str
    reason: str


class _Warning(_Event):
    type: Literal["warning"]
    text: str


class _Artifact(_Event):
    type: Literal["artifact"]
    path: str


_AnyEvent = _Metrics | _Progress | _Phase | _Resolved | _Warning | _Artifact
_EVENT: TypeAdapter[_AnyEvent] = TypeAdapter(Annotated[_AnyEvent, Field(discriminator="type")])


def phase_event(name: str) -> dict[str, Any]:
    """The event of a phase that a task is in itself, between its stages."""
    return {"type": "phase", "time": time.time(), "name": name}


class StageCancelled(Exception):
    """The stage was asked to stop, has saved a checkpoint if it could, and has ended."""


class StageFailed(Exception):
    """The stage ended without a result; the message names its log."""


class StageKilled(StageFailed):
    """The stage was ended from outside (a signal, the host's memory): worth another attempt."""


def run_stage(
    folder: Path,
    job: StageJob,
    python: Path,
    file: Path,
    grace_seconds: float,
    on_events: EventHandler,
    launcher: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a stage file to its end and return its result; `launcher` are Python's arguments before the file.

    `on_events` gets the new events of this attempt, in order, a few times a second; an exception of it is logged and
    does not stop the stage. Raises UserError for what the stage refused or if the folder is in use, StageCancelled,
    StageFailed.
    """
    raise_if_asked()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        _end_orphans(folder)  # of an attempt whose runner and supervisor were killed together
        prepare_folder(folder, job)
        tail = EventTail(folder / contract.EVENTS_FILE)
        tail.read()  # those of earlier attempts were told then
        command = [str(python), *launcher, str(file), str(folder)]
        with _lifeline(folder, command, grace_seconds, lock, code_of_job(folder, job)) as process:
            try:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    _tell(on_events, tail.read())
                    raise_if_asked()
            except BaseException:
                # Cancelled from outside (Ctrl-C, Prefect, a timeout): the stage gets its grace to save a checkpoint.
                cancelling.note_stopping()
                process.send_signal(signal.SIGTERM)
                process.wait(grace_seconds + 10)
                _tell(on_events, tail.read())
                raise
            _tell(on_events, tail.read())
        return _result(folder, process.returncode)


def raise_if_asked() -> None:
    """End here if the train that this process runs was asked to stop. Raises StageCancelled."""
    if cancelling.is_asked():
        raise StageCancelled


def prepare_folder(folder: Path, job: StageJob) -> None:
    """Write the job, and remove what an earlier attempt said of itself so that it cannot be taken for this one's."""
    job.output.mkdir(parents=True, exist_ok=True)
    for name in (contract.RESULT_FILE, supervisor.PROCESS_FILE):
        (folder / name).unlink(missing_ok=True)
    contract.write_json(folder / contract.JOB_FILE, job.model_dump(mode="json"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the job folder for oneself; gives the lock's file descriptor. Raises UserError if a stage runs in it."""
    with (folder / "lock").open("ab") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _taken(file.fileno()):
            if time.monotonic() > deadline:
                raise UserError(
                    "this stage is already running", file=folder, mend="wait for it, or `tuneline trains cancel` it"
                )
            time.sleep(_POLL_SECONDS)
        yield file.fileno()


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tell(on_events: EventHandler, events: list[dict[str, Any]]) -> None:
    try:
        on_events(events)
    except Exception:  # who only looks on must not end hours of training
        logging.getLogger(__name__).exception("the events of a stage could not be shown")


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
        return [_parse(line) for line in whole.split(b"\n")] if newline else []


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event: dict[str, Any] = _EVENT.validate_json(line).model_dump()
    except ValidationError:
        return {"type": "warning", "time": time.time(), "text": f"not an event: {line[:200]!r}"}
    return event


def stage_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a stage: ours without the servers' settings, which may hold credentials."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _GIVEN_TO_STAGES or not name.startswith(_KEPT_FROM_STAGES)
    }
    return kept | {
        **remote_code.variables([], Path()),  # a consent in our own environment counts for nothing
        "PYTHONPATH": str(PROJECT_ROOT),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }


def code_of_job(folder: Path, job: StageJob) -> dict[str, str]:
    """Environment by which the stage runs the code of models that its inputs allow (`remote_code`), and no other."""
    return remote_code.variables(job.inputs.get("remote_code", []), folder / "modules")


@contextlib.contextmanager
def _lifeline(
    folder: Path, stage: Sequence[str], grace: float, lock: int, code: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", supervisor.__file__, str(folder), str(grace), *stage]
    with (folder / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env=stage_environment({STAGE_FOLDER_VARIABLE: str(folder), **code, **stage_variables()}),
            pass_fds=[lock, *slot_descriptors()],
        )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(grace + 10)
        if process.returncode < 0:
            _end_orphans(folder)


def _end_orphans(folder: Path) -> None:
    """End what a stage of this folder started, in whatever session, after its supervisor was killed."""
    import psutil

    for process in psutil.process_iter():
        # Known by the environment it inherited: process ids are reused. Others' environments cannot be read.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(STAGE_FOLDER_VARIABLE) == str(folder):
                process.kill()


def _result(folder: Path, code: int) -> dict[str, Any]:
    path = folder / contract.RESULT_FILE
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("status") == "cancelled" or code == supervisor.EXIT_STOPPED:
        raise StageCancelled
    if result.get("refused"):
        raise UserError(result["error"])
    if code != 0 or result.get("status") != "completed":
        raise _failure(folder / contract.LOG_FILE, result.get("error"), code)
    return result


def _failure(log: Path, error: str | None, code: int) -> StageFailed:
    end = f"The log is {log}; its end:\n{last_lines(log, 15) or '(no log)'}"
    if error is not None:
        return StageFailed(f"{error}\n{end}")
    if code > 128:
        hint = " (out of memory?)" if code - 128 == signal.SIGKILL else ""
        return StageKilled(f"the stage was ended by signal {code - 128}{hint}\n{end}")
    if code < 0:
        return StageKilled(f"the stage's supervisor was ended by signal {-code}\n{end}")
    return StageFailed(f"the stage ended with exit code {code} and left no result\n{end}")

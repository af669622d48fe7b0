"""How a train is asked to stop, whatever it does at the moment: a file in its folder, and a signal to its process.

The signal reaches the flow between two stages, or while it waits; the file is what a flow goes by that runs on
another host of the same home folder, and it tells a cancelled train from one whose process was merely ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.files import write_record, write_text
from tasks.processes import find_process, process_start

_REQUEST_FILE = "cancel"
_STOPPING_FILE = "stopping"
_OWNER_FILE = "owner.json"
_owned: set[Path] = set()


class Owner(BaseModel):
    """The process that runs a train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    pid: int
    start: float


def note_owner(folder: Path) -> None:
    """Say that this process runs the train of `folder`, and is the one to be asked to stop."""
    start = process_start(psutil.Process())
    write_record(folder / _OWNER_FILE, Owner(host=socket.gethostname(), pid=os.getpid(), start=start))
    _owned.add(folder)


def take_back(folder: Path) -> None:
    """Forget what was asked of an earlier attempt: the train goes on."""
    (folder / _REQUEST_FILE).unlink(missing_ok=True)
    (folder / _STOPPING_FILE).unlink(missing_ok=True)


def forget_owner(folder: Path) -> None:
    """Say that this process has ended its work on the train."""
    _owned.discard(folder)


def ask_to_stop(folder: Path) -> None:
    """Ask whoever runs the train of `folder` to save a checkpoint and stop."""
    write_text(folder / _REQUEST_FILE, "")
    with contextlib.suppress(FileNotFoundError, ValidationError):
        owner = Owner.model_validate_json((folder / _OWNER_FILE).read_bytes())
        process = find_process(owner.pid, owner.start) if owner.host == socket.gethostname() else None
        if process is not None:
            process.send_signal(signal.SIGTERM)


def is_asked() -> bool:
    """Whether a train that this process runs was asked to stop."""
    return any((folder / _REQUEST_FILE).exists() for folder in _owned)


def was_asked(folder: Path) -> bool:
    """Whether somebody has asked the train of `folder` to stop since it was taken up."""
    return (folder / _REQUEST_FILE).exists()


def note_stopping() -> None:
    """Say of the trains of this process that they are being stopped: it may be killed before they have ended."""
    for folder in _owned:
        write_text(folder / _STOPPING_FILE, "")


def was_stopping(folder: Path) -> bool:
    """Whether the train of `folder` was being stopped, by whatever way, when its process ended."""
    return was_asked(folder) or (folder / _STOPPING_FILE).exists()

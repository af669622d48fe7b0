"""Processes on this host: told from later ones with the same id, and found with all that they have started."""

from __future__ import annotations

import sys

import psutil

# Set for the supervisor of a stage, which everything of that stage inherits.
STAGE_FOLDER_VARIABLE = "STAGE_JOB_FOLDER"
# Set for the servers of an endpoint: they are to outlive the flow run that has started them.
OUTLIVES_VARIABLE = "TUNELINE_OUTLIVES"


def process_start(process: psutil.Process) -> float:
    """Seconds that tell a process from a later one with the same id. Raises psutil.NoSuchProcess.

    On Linux psutil's creation time moves when the clock is set, and the boot time along with it; their
    difference is what the kernel really stores.
    """
    created = process.create_time()
    return round(created - psutil.boot_time(), 2) if sys.platform == "linux" else created


def find_process(pid: int, start: float) -> psutil.Process | None:
    """The running process with this id and `process_start`; None if it ended, whoever has its id by now."""
    try:
        process = psutil.Process(pid)
        same = abs(process_start(process) - start) < 0.02
        return process if same and is_running(process) else None
    except psutil.NoSuchProcess:
        return None


def is_running(process: psutil.Process) -> bool:
    """Whether the process does anything yet: not ended, and no zombie.

    A zombie that its parent does not fetch (a container without an init) would be waited for in vain.
    """
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_descendants(roots: list[psutil.Process]) -> list[psutil.Process]:
    """The processes and everything below them as it is now, each once."""
    found = {process.pid: process for process in roots}
    for root in roots:
        try:
            found |= {child.pid: child for child in root.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())

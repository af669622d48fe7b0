"""Find the processes of a started service again, and end them: all of them, and no others."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import psutil

from configs.services import ServiceRecord
from tasks.processes import find_process, is_running, with_descendants

TOKEN_VARIABLE = "TUNELINE_SERVICE_TOKEN"  # noqa: S105 (a name, not a secret)


def is_alive(record: ServiceRecord) -> bool:
    """Whether the recorded process runs; false if its id belongs to another process by now."""
    return find_process(record.pid, record.process_start) is not None


@dataclass(frozen=True)
class Ended:
    """What became of a process tree: the ids found at first, and those that not even SIGKILL has ended."""

    found: frozenset[int]
    left: tuple[int, ...]


def end_tree(record: ServiceRecord, stop_seconds: float, save_seconds: float) -> Ended:
    """End the service and everything below it: SIGTERM, and SIGKILL when its time is over.

    The service has `stop_seconds`; as long as something it started in a process group of its own lives (a
    flow run that saves a checkpoint), it has `save_seconds`.
    """
    leader = find_process(record.pid, record.process_start)
    tree = with_descendants([leader] if leader is not None else _orphans(record))
    found = frozenset(process.pid for process in tree)
    _terminate(record, tree)
    tree = _wait_gone(record, tree, stop_seconds, save_seconds)
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(tree, timeout=stop_seconds)
    return Ended(found=found, left=tuple(process.pid for process in left if is_running(process)))


def flow_runs_below(record: ServiceRecord) -> frozenset[str]:
    """The ids of the flow runs whose processes a worker has started and that are still there."""
    leader = find_process(record.pid, record.process_start)
    found = set()
    for process in with_descendants([leader] if leader is not None else _orphans(record)):
        try:
            found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return frozenset(found - {""})


def _orphans(record: ServiceRecord) -> list[psutil.Process]:
    """What a leader that was killed from outside has left in its process group.

    The token alone would be too much: a model endpoint that a flow run has started inherits it as well, and
    is to outlive the worker.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == record.pid and process.environ().get(TOKEN_VARIABLE) == record.token:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _terminate(record: ServiceRecord, tree: list[psutil.Process]) -> None:
    """SIGTERM to the service's group and to those of its direct children, which are the worker's flow runs.

    Not to what lies deeper: a stage is told by the flow run that started it, and one whose data loaders are
    ended under it cannot save its checkpoint.
    """
    groups = set()
    for process in tree:
        try:
            if record.pid in (process.pid, process.ppid(), os.getpgid(process.pid)):
                groups.add(os.getpgid(process.pid))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    for group in groups:
        try:
            os.killpg(group, signal.SIGTERM)
        except ProcessLookupError:
            continue


def _wait_gone(
    record: ServiceRecord, tree: list[psutil.Process], stop_seconds: float, save_seconds: float
) -> list[psutil.Process]:
    """Wait for the tree to end by itself. Returns what is left of it when its time is over."""
    begun = time.monotonic()
    while tree:
        _, alive = psutil.wait_procs(tree, timeout=0.1)
        # Looked up again each time: until it reads the signal, a server may start one more process.
        tree = with_descendants([process for process in alive if is_running(process)])
        saving = any(_group(process) not in (record.pid, None) for process in tree)
        if time.monotonic() - begun > (save_seconds if saving else stop_seconds):
            break
    return tree


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None

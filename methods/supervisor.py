"""Runs one stage and owns its whole process tree.

Run as: python supervisor.py JOB_DIR GRACE_SECONDS COMMAND...   (standard library only)

Standard input is a lifeline held by whoever started the stage: when that process ends in any way, the line closes
and the stage is asked to stop (SIGTERM: save a checkpoint), then killed. The same happens on SIGTERM here. Exits with
the stage's exit code, 128 + N if signal N ended it, or 4 if a signal ended it after it was asked to stop (it may not
listen yet, or never). The starter's lock on the job folder is inherited, so that it holds as long as this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

EXIT_STOPPED = 4
PROCESS_FILE = "process.json"
LOG_FILE = "train.log"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    folder, grace, command = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    wakeup, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopt_orphans()
    stage = _start(folder, command)
    _write_process(folder, stage.pid)
    try:
        asked = _watch(stage, wakeup, grace)
    finally:
        _kill_group(stage.pid, signal.SIGKILL)
        _end_descendants()
    if stage.returncode >= 0:
        return stage.returncode
    return EXIT_STOPPED if asked else 128 - stage.returncode


def _start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    with (folder / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            # Safe here: this process has one thread. The stage dies even if the supervisor is SIGKILLed.
            preexec_fn=_die_with_parent,
        )


def _watch(stage: subprocess.Popen[bytes], wakeup: int, grace: float) -> bool:
    """Wait for the stage's end; True if it was asked to stop."""
    deadline: float | None = None
    sources = [sys.stdin.fileno(), wakeup]
    while stage.poll() is None:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(sources, [], [], timeout)
        asked = wakeup in ready and signal.SIGTERM in os.read(wakeup, 512)
        lifeline_closed = sources[0] != wakeup and sources[0] in ready and not os.read(sources[0], 512)
        if lifeline_closed:
            sources = [wakeup]
        if (asked or lifeline_closed) and deadline is None:
            _kill_group(stage.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() >= deadline:
            _kill_group(stage.pid, signal.SIGKILL)
            stage.wait()
    return deadline is not None


def _write_process(folder: Path, stage_pid: int) -> None:
    content = json.dumps({"supervisor": os.getpid(), "stage": stage_pid, "started": time.time()})
    temporary = folder / f".{PROCESS_FILE}.{os.getpid()}"
    temporary.write_text(content)
    temporary.replace(folder / PROCESS_FILE)


def _kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_descendants() -> None:
    """End what the stage started in sessions of its own; as a subreaper we inherit it once its parents are gone."""
    for _ in range(50):
        children = _descendants(os.getpid())
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat") if Path("/proc/self/stat").exists() else ():
        with contextlib.suppress(OSError):
            # The command name may hold blanks and brackets: the fields are counted from the last bracket.
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
    found: list[int] = []
    level = [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found.extend(level)
    return found


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())

"""Ends a process that would outlive the one it serves.

Run as: python -m deployments.guard PID START   (START as of `tasks.processes.process_start`)

Standard input is held by the process that is served: when it ends in any way, SIGKILL included, the input closes and
process PID is ended. Prefect's embedded server needs this: Prefect ends it at the exit of the interpreter only.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil

from configs.settings import PROJECT_ROOT
from tasks.processes import find_process, process_start

_EMBEDDED_SERVER = "prefect.server.api.server:create_app"
_STOP_SECONDS = 5.0
_guards: dict[int, subprocess.Popen[bytes]] = {}  # kept, so that their standard inputs stay open


def start_embedded_server() -> None:
    """Start the Prefect server that this process needs if none is standing; it ends with this process, not before.

    To be called before a flow. The server of Prefect's own would be ended by the Ctrl-C in the terminal that the
    flow is still to tell it of, and the flow would wait for it for minutes.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    # A process inherits which signals are blocked: Ctrl-C does not reach the server, and us when it has started.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            client.hello()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    guard_embedded_server()


def guard_embedded_server() -> None:
    """Let the Prefect server that this process has started for itself, if any, end with it, whatever happens."""
    for child in psutil.Process().children():
        if child.pid in _guards or _EMBEDDED_SERVER not in child.cmdline():
            continue
        command = [sys.executable, "-m", "deployments.guard", str(child.pid), str(process_start(child))]
        _guards[child.pid] = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )


def main() -> None:
    pid, start = int(sys.argv[1]), float(sys.argv[2])
    sys.stdin.buffer.read()
    process = find_process(pid, start)
    if process is None:
        return
    process.terminate()
    _, left = psutil.wait_procs([process], timeout=_STOP_SECONDS)
    for each in left:
        each.kill()


if __name__ == "__main__":
    main()

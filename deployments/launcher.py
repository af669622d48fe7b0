"""Runs the command of a flow run in its environment, on behalf of a Prefect worker, and owns all that it starts.

Run as: python -P -m deployments.launcher [--conda EXE] [--environment ENV] [--gpus 0,1] -- COMMAND...

A worker signals one process and looks at one exit code, and `conda run` passes no signal on. This process is what
the worker sees. Asked to stop (SIGTERM), it tells the process of the flow, which asks its stage to save a checkpoint;
after the grace period, or once the command has ended, nothing of the tree is left. What is marked as outliving the
flow run (the servers of an endpoint) is spared.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from configs.errors import UserError
from configs.settings import load_settings
from tasks.files import last_lines
from tasks.processes import OUTLIVES_VARIABLE, STAGE_FOLDER_VARIABLE, is_running, with_descendants

# Beyond what a stage has: the flow still records how its train ended, and tells MLflow and Prefect.
MARGIN_SECONDS = 30.0
# What Prefect's own cancellation has before it is helped. It kills the flow after 30 seconds.
SETTLE_SECONDS = 20.0
_KILL_SECONDS = 10.0
_PR_SET_CHILD_SUBREAPER = 36
_ASKED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the command, or 128 + N if signal N ended it."""
    options = _options(argv)
    wakeup = _listen_to_signals()
    _adopt_orphans()
    try:
        command, environment = in_environment(options.command, options.conda, options.environment)
    except UserError as error:
        _report(error)
        return 1
    if options.gpus:
        environment["TUNELINE_GPUS"] = "" if options.gpus == "none" else options.gpus
    grace = options.grace if options.grace is not None else load_settings().grace_seconds + MARGIN_SECONDS
    log = options.log or _own_log()
    offset = log.stat().st_size if log.exists() else 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # Not the worker's pipe: a flow that prints to it after the worker's death would end as well.
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # signals for the worker's group are ours to pass on
        )
    tree = _Tree(child, grace, options.settle)
    code = tree.watch(wakeup)
    if tree.asked is None and not _has_begun():
        _report_silent_end(options, code, last_lines(log, 40, offset))
    return code


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.launcher", description=__doc__)
    parser.add_argument("--conda", default="", help="conda, mamba or micromamba")
    parser.add_argument("--environment", default="", help="name or folder; empty: the environment of this interpreter")
    parser.add_argument("--gpus", default="", help="numbers or UUIDs of the GPUs that may be used, or `none`")
    parser.add_argument("--grace", type=float, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds for Prefect's own cancellation")
    parser.add_argument("--log", type=Path, help="file that the command's output is appended to")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _own_log() -> Path:
    return load_settings().services / "flow_runs" / f"{_flow_run() or 'unknown'}.log"


# --- the environment ----------------------------------------------------------------------------------------


def in_environment(command: list[str], conda: str, environment: str) -> tuple[list[str], dict[str, str]]:
    """The command as it is to be started for an environment, and the variables for it.

    Raises UserError for an environment or a conda executable that is not there.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    if not environment:
        # Not resolved: the interpreter of a virtual environment is a link to another one.
        return command, _with_path(variables, Path(sys.executable).parent)
    prefix = Path(environment).expanduser() if _is_folder(environment) else None
    if prefix is not None and not (conda and (prefix / "conda-meta").is_dir()):
        return command, _activated(variables, prefix.absolute())
    if prefix is None and not conda:
        raise _no_environment(environment, "a name needs a conda executable; without one, give the folder")
    target = ["-n", environment] if prefix is None else ["-p", str(prefix.absolute())]
    executable = _find_conda(conda)
    # micromamba, and mamba since version 2, leave the output alone and know no option for it.
    captures = [] if _is_micromamba(executable) else ["--no-capture-output"]
    return [executable, "run", *captures, *target, *command], variables


def _is_folder(environment: str) -> bool:
    return os.sep in environment or environment.startswith(("~", "."))


def _activated(variables: dict[str, str], prefix: Path) -> dict[str, str]:
    """The variables by which programs find a conda or virtual environment; its activation scripts are not run."""
    if not (prefix / "bin" / "python").exists():
        raise _no_environment(str(prefix), "a folder with bin/python in it")
    kept = {name: value for name, value in variables.items() if name not in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    kind = "CONDA_PREFIX" if (prefix / "conda-meta").is_dir() else "VIRTUAL_ENV"
    if kind == "CONDA_PREFIX":
        kept["CONDA_DEFAULT_ENV"] = prefix.name
    return _with_path({**kept, kind: str(prefix)}, prefix / "bin")


def _with_path(variables: dict[str, str], first: Path) -> dict[str, str]:
    return {**variables, "PATH": os.pathsep.join([str(first), variables.get("PATH", os.defpath)])}


def _find_conda(conda: str) -> str:
    found = shutil.which(str(Path(conda).expanduser()))
    if found is None:
        raise UserError(
            f"there is no such conda executable on {socket.gethostname()}",
            field="conda",
            value=conda,
            expected="conda, mamba or micromamba, by its name on the worker's PATH or by its whole path",
            mend="change the work pool's conda executable, or leave it empty and give the folder of an environment",
        )
    return found


def _is_micromamba(executable: str) -> bool:
    name = Path(executable).name
    if name != "mamba":
        return name == "micromamba"
    # mamba 1 tells the version of the conda that it is part of, mamba 2 its own alone.
    told = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return "conda" not in told.stdout


def _no_environment(environment: str, expected: str) -> UserError:
    return UserError(
        f"the environment of the flow is not on {socket.gethostname()}",
        field="environment",
        value=environment,
        expected=expected,
        mend="create it on this host with Tuneline in it, or change the environment of the work pool",
    )


# --- the processes ------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    """The command with everything below it, from its start to its end."""

    child: subprocess.Popen[bytes]
    grace: float
    settle: float
    asked: float | None = None
    ended: float | None = None
    known: set[psutil.Process] = field(default_factory=set)
    told: set[psutil.Process] = field(default_factory=set)

    def watch(self, wakeup: int) -> int:
        """Wait for the end of the command and of all that it has left behind; returns its exit code."""
        timeout: float | None = None if sys.platform == "linux" else 5.0
        while True:
            select.select([wakeup], [], [], timeout)
            if self._was_asked(wakeup) and self.asked is None:
                # Prefect's own cancellation reaches the flow by another way: told twice, it would be interrupted
                # while it records how its train ended.
                self.asked = time.monotonic() + (self.settle if _is_cancelling() else 0)
            self._reap()
            if self.asked is not None or self.ended is not None:
                timeout = 0.1
                if self._stop():
                    break
            elif sys.platform != "linux":
                self._ours()  # seen now, because there an orphan cannot be found any more
        code = self.child.returncode
        return code if code >= 0 else 128 - code

    def _was_asked(self, wakeup: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            return any(number in os.read(wakeup, 512) for number in _ASKED_BY)
        return False

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.child.pid:
                    self.child.returncode = os.waitstatus_to_exitcode(status)
                    self.ended = time.monotonic()

    def _stop(self) -> bool:
        """One step towards the end of the tree; True once nothing of it is left."""
        left = self._ours()
        if self.ended is not None and not left:
            return True
        now = time.monotonic()
        if self.ended is not None:
            # Stages notice that their flow has ended, and end after having saved. Nobody else knows.
            self._tell(process for process in left if not _belongs_to_stage(process))
        elif self.asked is not None and now >= self.asked:
            self._tell(self._flows(left))
        over = min(moment for moment in (self.asked, self.ended) if moment is not None) + self.grace
        if now >= over:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if now >= over + _KILL_SECONDS:
            _say(f"the system holds the processes {sorted(process.pid for process in left)}")
            return True
        return False

    def _ours(self) -> list[psutil.Process]:
        """What is to end with this flow run, the command first; not what outlives it."""
        found = with_descendants([psutil.Process()])[1:]
        self.known = {process for process in {*self.known, *found} if is_running(process)}
        spared = with_descendants([process for process in self.known if _has(process, OUTLIVES_VARIABLE)])
        return sorted(self.known - set(spared), key=lambda process: process.pid != self.child.pid)

    def _flows(self, left: list[psutil.Process]) -> list[psutil.Process]:
        """Who is told to stop: the flow's process, and neither a stage's, whose data loaders must live until its
        checkpoint is saved, nor conda's, by whom the exit code comes.

        Prefect starts the flow's process in a session of its own. Before there is one, everything is told.
        """
        told = [process for process in left if not _belongs_to_stage(process)]
        leaders = [process for process in told if process.pid != self.child.pid and _leads_session(process)]
        return leaders or ([] if self.told else told)

    def _tell(self, processes: Iterator[psutil.Process] | list[psutil.Process]) -> None:
        for process in set(processes) - self.told:
            self.told.add(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _has(process: psutil.Process, variable: str) -> bool:
    try:
        return variable in process.environ()
    except (psutil.Error, OSError):  # ended, or not ours to look into
        return False


def _belongs_to_stage(process: psutil.Process) -> bool:
    return _has(process, STAGE_FOLDER_VARIABLE)


def _leads_session(process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == process.pid
    except ProcessLookupError:
        return False


def _listen_to_signals() -> int:
    """The end of a pipe from which the numbers of the signals can be read that have come."""
    wakeup, wakeup_write = os.pipe()
    for end in (wakeup, wakeup_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_ASKED_BY):
        signal.signal(number, lambda *_: None)
    return wakeup


def _adopt_orphans() -> None:
    """Become the parent of whatever loses its own below this process, so that it can be found; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


# --- what Prefect is told -----------------------------------------------------------------------------------


def _report_silent_end(options: argparse.Namespace, code: int, said: str) -> None:
    """Tell of a flow that has not begun: only its own output, which nobody reads, says why."""
    where = f"the environment '{options.environment}'" if options.environment else f"the environment {sys.prefix}"
    known = _known_environments(options) if options.environment and options.conda else None
    _report(
        UserError(
            f"{where} could not run the flow on {socket.gethostname()} (exit code {code}). It said:\n{said}",
            field="environment" if options.environment else None,
            value=options.environment or None,
            expected=f"one of {', '.join(known)}" if known else "an environment with Tuneline and Prefect in it",
            mend="create it on this host with Tuneline in it, or change the environment of the work pool",
        )
    )


def _known_environments(options: argparse.Namespace) -> list[str] | None:
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired, UserError):
        command = [_find_conda(options.conda), "env", "list", "--json"]
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return [Path(path).name for path in json.loads(told.stdout)["envs"]]
    return None


def _report(error: UserError) -> None:
    """Say it in the worker's log, in the flow run's, and as the reason why the run has crashed."""
    _say(str(error))
    flow_run = _flow_run()
    if flow_run is None:
        return
    line = {"name": "tuneline.launcher", "level": 40, "message": str(error), "flow_run_id": flow_run}
    _ask("/logs/", [{**line, "timestamp": datetime.now(UTC).isoformat()}])
    state = {"type": "CRASHED", "name": "Crashed", "message": str(error)}
    _ask(f"/flow_runs/{flow_run}/set_state", {"state": state})


def _is_cancelling() -> bool:
    found = _found_flow_run()
    return found is not None and found["state_type"] in ("CANCELLING", "CANCELLED")


def _has_begun() -> bool:
    """Whether the flow itself has run, and told of its end; also if nobody can say."""
    found = _found_flow_run()
    if found is None or found["state_type"] in ("SCHEDULED", "PENDING"):
        return found is None
    # `prefect flow-run execute` reports a flow that cannot be imported as crashed, without the reason.
    return bool(found["state_type"] != "CRASHED" or found["run_count"] > 0)


def _found_flow_run() -> dict[str, Any] | None:
    flow_run = _flow_run()
    return _ask(f"/flow_runs/{flow_run}") if flow_run is not None else None


def _flow_run() -> str | None:
    with contextlib.suppress(KeyError, ValueError):
        return str(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    return None


def _ask(path: str, body: object = None) -> Any:
    """The answer of the Prefect server, None if there is none: the worker tells of the run's end anyhow."""
    api = os.environ.get("PREFECT_API_URL", "")
    if not api.startswith(("http://", "https://")):
        return None
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{api.rstrip('/')}{path}", data, headers)  # noqa: S310 - said above
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        content = answer.read()
        return json.loads(content) if content else None
    return None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the worker, who reads it, may have died
        print(f"launcher: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

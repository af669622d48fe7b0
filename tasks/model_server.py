"""The processes behind an endpoint: the server of a model and the gateway, from their start to their end.

What the server of a model is, is up to the target (`tasks.targets`); the gateway (`tasks.gateway`) keeps the
endpoint's address.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from configs.endpoints import API_KEY_VARIABLE, Deployment, Endpoint, ProcessReference
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, load_settings
from methods.toolkit import remote_code
from tasks.files import last_lines, write_record
from tasks.processes import OUTLIVES_VARIABLE, find_process, process_start, with_descendants

TOOLKIT = PROJECT_ROOT / "methods" / "toolkit"
"""Folder of the programs that the serving interpreter runs."""

_GATEWAY_PORTS = range(8100, 9000)
_PORT_ATTEMPTS = 3
# As Python and vLLM, and as llama.cpp's server say it.
_PORT_TAKEN = re.compile(r"address already in use|couldn't bind", re.IGNORECASE)


@dataclass
class EndpointWork:
    """One operation under the endpoint's lock: its folder, its record, and what it started or uploaded itself."""

    folder: Path
    endpoint: Endpoint
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    uploaded: list[Deployment] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """The file of the record."""
        return self.folder / "endpoint.json"

    def save(self) -> None:
        """Replace the record on disk, which is what switches the endpoint."""
        write_record(self.record, self.endpoint, private=True)


# --- the server of a model ----------------------------------------------------------------------------------


def start_model_server(
    work: EndpointWork,
    deployment: Deployment,
    command: Callable[[], list[str]],
    environment: Mapping[str, str],
    folder: Path,
    start_timeout: float,
) -> None:
    """Start the model's server in `folder` and wait until it is healthy, unless it already runs.

    `command` is asked for once the deployment has a port, which may be another one when that was taken in the
    meantime. `start_timeout` is in seconds. Raises UserError with the end of the server's log.
    """
    if deployment.model == work.endpoint.current and is_alive(deployment.process):
        return
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        deployment.port = _free_port()
        offset = deployment.log.stat().st_size if deployment.log.exists() else 0
        process = _spawn(work, command(), deployment.log, folder, dict(environment))
        deployment.process = _reference(process.pid)
        work.save()
        if _wait_until_listening(process, deployment.port, start_timeout, health=True):
            return
        said = last_lines(deployment.log, 30, offset)
        code = process.poll()  # asked before it is stopped, which leaves nothing to ask
        stop_server(deployment.process, grace=5)
        if not _PORT_TAKEN.search(said) or attempt == _PORT_ATTEMPTS:
            ended = "was stopped" if code is None else f"ended with exit code {code}"
            raise UserError(
                f"the server of '{deployment.model}' was not healthy within {start_timeout:g} s; it {ended}. "
                f"The end of its log:\n{said}",
                file=deployment.log,
            )


def server_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a model server: ours without keys and paths of our own, on the GPUs that endpoints may use."""
    hidden = {API_KEY_VARIABLE, "PYTHONPATH", "PYTHONHOME"}
    gpus = load_settings().endpoint_gpus
    devices = {"CUDA_VISIBLE_DEVICES": gpus, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if gpus is not None else {}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    fixed = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A consent in our own environment counts for nothing.
    return kept | remote_code.variables([], Path()) | fixed | devices | dict(extra or {})


def guarded(work: EndpointWork, command: Sequence[str | Path]) -> list[str]:
    """The command, watched: it ends with whoever started it, unless the endpoint's record keeps it by then."""
    return [sys.executable, str(TOOLKIT / "run_guarded.py"), str(work.record), *map(str, command)]


def run_tool(work: EndpointWork, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> int:
    """Run a program to its end, however long it takes; its exit code. It does not outlive this process."""
    process = _spawn(work, guarded(work, command), log, log.parent, dict(environment))
    try:
        return process.wait()
    finally:
        stop_server(_reference(process.pid), grace=5)
        work.started.remove(process)
        if process.stdin is not None:
            process.stdin.close()


# --- the gateway --------------------------------------------------------------------------------------------


def start_gateway(work: EndpointWork) -> None:
    """Start the endpoint's gateway unless it runs. Raises UserError with the end of its log.

    Its port may still move while nobody has been told of it.
    """
    gateway = work.endpoint.gateway
    if gateway is None:
        raise RuntimeError(f"{work.record}: the address was not chosen")
    if is_alive(gateway.process):
        return
    new = not any(each.switched_at for each in work.endpoint.deployments)
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        work.save()
        offset = gateway.log.stat().st_size if gateway.log.exists() else 0
        command = [sys.executable, "-m", "tasks.gateway", str(work.record)]
        process = _spawn(work, command, gateway.log, PROJECT_ROOT, environment)
        gateway.process = _reference(process.pid)
        if _wait_until_listening(process, gateway.port, 60.0):
            return
        stop_server(gateway.process, grace=5)
        gateway.process = None
        said = last_lines(gateway.log, 30, offset)
        if not new or not _PORT_TAKEN.search(said) or attempt == _PORT_ATTEMPTS:
            raise UserError(
                f"the gateway of the endpoint '{work.endpoint.name}' could not listen on "
                f"{gateway.host}:{gateway.port}. The end of its log:\n{said}",
                file=gateway.log,
                mend="end whatever else listens on that port",
            )
        gateway.port = free_gateway_port(work, gateway.host, first=gateway.port + 1)


# --- starting and waiting -----------------------------------------------------------------------------------


def _spawn(
    work: EndpointWork, command: list[str], log: Path, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a server detached, in a process group of its own, tied to this process only by its standard input."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, OUTLIVES_VARIABLE: "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    work.started.append(process)
    return process


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, timeout: float, *, health: bool = False) -> bool:
    """Whether this very process came to listen on the port (and answers `/health`) before it ended or time was up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if _listens(process.pid, port) and (not health or _healthy(port)):
            return True
        time.sleep(0.1)
    return False


def _listens(pid: int, port: int) -> bool:
    # By the process, not by connecting: on a port taken in the meantime, somebody else would answer.
    # Or by one it has started: a custom server may listen in a worker.
    for process in with_descendants([psutil.Process(pid)]) if psutil.pid_exists(pid) else []:
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
                return True
    return False


def _healthy(port: int) -> bool:
    import httpx

    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, trust_env=False).is_success
    return False


# --- ending -------------------------------------------------------------------------------------------------


def let_go(work: EndpointWork) -> None:
    """Close the pipes that tie servers to this process: from here on they live or die by the record."""
    for process in work.started:
        if process.stdin is not None:
            process.stdin.close()
    work.started.clear()


def stop_started(work: EndpointWork) -> None:
    """End what this operation has started itself, at once."""
    for process in work.started:
        stop_server(_reference(process.pid), grace=5)


def stop_server(reference: ProcessReference | None, *, grace: float) -> None:
    """End a server's whole group: SIGTERM, `grace` seconds to finish requests, SIGKILL."""
    leader = _process(reference)
    if leader is None:
        return
    tree = with_descendants([leader])
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(tree, timeout=grace)
    if left:
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


# --- process identity ---------------------------------------------------------------------------------------------


def _reference(pid: int) -> ProcessReference | None:
    with suppress(psutil.NoSuchProcess):
        return ProcessReference(pid=pid, started=process_start(psutil.Process(pid)))
    return None


def is_alive(reference: ProcessReference | None) -> bool:
    """Whether the recorded process runs; false if its id belongs to another process by now."""
    return _process(reference) is not None


def _process(reference: ProcessReference | None) -> psutil.Process | None:
    return find_process(reference.pid, reference.started) if reference is not None else None


# --- ports --------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_gateway_port(work: EndpointWork, host: str, *, first: int = _GATEWAY_PORTS.start) -> int:
    """The first port from `first` on that is free now and promised to no other endpoint. Raises UserError.

    Not one the system hands out by itself: while the endpoint is down, any outgoing connection might be given it.
    """
    ports = range(first, _GATEWAY_PORTS.stop)
    records = [path for path in work.folder.parent.glob("*/endpoint.json") if path != work.record]
    others = [Endpoint.model_validate_json(path.read_text(encoding="utf-8")).gateway for path in records]
    promised = {gateway.port for gateway in others if gateway is not None}
    for port in ports:
        if port not in promised and _can_bind(host, port):
            return port
    raise UserError(
        f"no port from {ports.start} to {ports.stop - 1} is free on {host}", field="port", mend="name a port"
    )


def _can_bind(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError("this host cannot be listened on", field="host", value=host) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True

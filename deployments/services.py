"""The Prefect server, the MLflow server and one worker, started and ended as `tuneline up` and `down`.

Each runs detached, in a session of its own, with a record in `settings.services`. Only what has a record is
ever ended, and only if the process found under its id is the one that was started.
"""

from __future__ import annotations

import fcntl
import http.client
import ipaddress
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from pydantic import ValidationError

from configs.errors import UserError
from configs.services import Addresses, ServiceName, ServiceRecord, ServiceState, ServiceStatus
from configs.settings import Settings, apply_environment
from deployments.flow_deployments import WORK_POOL, deploy_flows
from deployments.processes import TOKEN_VARIABLE, end_tree, is_alive
from tasks.files import last_lines, write_record
from tasks.processes import process_start

SERVICES: tuple[ServiceName, ...] = ("prefect", "mlflow", "worker")
START_SECONDS = 180.0
# A server has nothing to save; a worker's flow runs get `grace_seconds` for their checkpoints instead.
STOP_SECONDS = 10.0
WORKER_QUERY_SECONDS = "2"

_PORT_VARIABLES = {"prefect": "TUNELINE_PREFECT_PORT", "mlflow": "TUNELINE_MLFLOW_PORT"}
_set_by_connect: dict[str, str] = {}


# --- the verbs ---------------------------------------------------------------------------------------------


def up(settings: Settings) -> list[ServiceStatus]:
    """Start whichever of the three is missing, wait until all answer, deploy the flows; harmless if they run already.

    Raises UserError if the host is open to the network, a port is taken, or one does not become healthy;
    what this call had started is then ended again.
    """
    _refuse_open_host(settings)
    apply_environment(settings)
    with _locked(settings):
        begun: list[ServiceRecord] = []
        try:
            servers = _bring_up_servers(settings, begun)
            deploy_flows(settings, f"{servers[0].address}/api")
            worker = _bring_up_worker(settings, servers, begun)
        except BaseException:
            for record in reversed(begun):
                _end(settings, record)
            raise
    new = {record.name for record in begun}
    return [_told(record, "started" if record.name in new else "already running") for record in (*servers, worker)]


def down(settings: Settings) -> list[ServiceStatus]:
    """End what `up` started, with every process below it, and nothing else; harmless if nothing runs.

    Flow runs of the worker are ended first and have `settings.grace_seconds` to save their checkpoints.
    Raises UserError if a process cannot be ended.
    """
    if not settings.services.is_dir():
        return [ServiceStatus(name=name, state="not running") for name in SERVICES]
    with _locked(settings):
        told = []
        for name in reversed(SERVICES):
            record = _read_record(settings, name)
            ended = _end(settings, record) if record is not None else False
            told.append(ServiceStatus(name=name, state="stopped" if ended else "not running"))
        return told[::-1]


def status(settings: Settings) -> list[ServiceStatus]:
    """How each of the three is now. Changes nothing."""
    told = []
    for name in SERVICES:
        record = _read_record(settings, name)
        if record is None or not is_alive(record):
            told.append(ServiceStatus(name=name, state="not running"))
        else:
            told.append(_told(record, "running" if _is_healthy(record) else "not answering"))
    return told


def addresses(settings: Settings) -> Addresses:
    """Where the running servers answer. Cheap: reads the records and looks at the processes only."""
    prefect = _running(settings, "prefect")
    mlflow = _running(settings, "mlflow")
    return Addresses(
        prefect_api=f"{prefect.address}/api" if prefect else None,
        prefect_ui=prefect.address if prefect else None,
        mlflow=mlflow.address if mlflow else None,
    )


def connect(settings: Settings) -> Addresses:
    """Point this process at the running servers, or at the embedded ones on the same databases.

    To be called before `prefect` or `mlflow` is imported: both read their environment then. An address
    that somebody else has put into the environment (a team's own server) is left alone.
    """
    apply_environment(settings)
    found = addresses(settings)
    # Not setdefault: an embedded run must land in the database that `tuneline up` shows.
    os.environ["PREFECT_HOME"] = str(settings.prefect_home)
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    # The first embedded run creates the database, which on a small machine takes nearly the default 20 s.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    _point("PREFECT_API_URL", found.prefect_api)
    settings.mlflow_database.parent.mkdir(parents=True, exist_ok=True)
    _point("MLFLOW_TRACKING_URI", found.mlflow or mlflow_database_uri(settings))
    return found


def running_prefect_api(settings: Settings) -> str:
    """The API address of the Prefect server to talk to: the one of the environment, else the one `up` started.

    Raises UserError if there is none.
    """
    connect(settings)
    address = os.environ.get("PREFECT_API_URL")
    if address is None:
        raise UserError("no Prefect server is running", mend="start one: tuneline up")
    return address


def what_to_click(settings: Settings) -> str:
    """The pages' addresses and the first steps on them, for the terminal."""
    found = addresses(settings)
    if found.prefect_ui is None and found.mlflow is None:
        return "No server is running. Start them: tuneline up"
    lines = []
    if found.prefect_ui is not None:
        lines += [
            f"Prefect  {found.prefect_ui}",
            "  Runs         > the newest run > Logs: its progress as it goes; Artifacts: its results",
            "  Deployments  > a training method > Run > Custom run: the form that starts a train",
        ]
    if found.mlflow is not None:
        lines += [
            f"MLflow   {found.mlflow}",
            "  Experiments  > the newest run > Model metrics: its curves; Artifacts: its files",
            "  Experiments  > tick several runs > Compare: trains side by side",
            "  Models       > what was trained, and from what",
        ]
    return "\n".join([*lines, "Stop them: tuneline down"])


def mlflow_database_uri(settings: Settings) -> str:
    """The tracking address of the embedded MLflow client, and the backend store of the server."""
    return f"sqlite:///{settings.mlflow_database}"


def mlflow_artifact_location(settings: Settings) -> str:
    """The `artifact_location` that every experiment must be created with, embedded or not.

    A file address, not `mlflow-artifacts:`, which a client on the SQLite file cannot resolve: with it, a run
    logged with the servers up could not be read after `tuneline down`.
    """
    return settings.mlflow_artifacts.as_uri()


# --- starting ----------------------------------------------------------------------------------------------


def _bring_up_servers(settings: Settings, begun: list[ServiceRecord]) -> tuple[ServiceRecord, ServiceRecord]:
    """Both servers healthy; they take ten seconds each, so they start side by side."""
    missing: tuple[ServiceName, ...] = ("prefect", "mlflow")
    running = {name: record for name in missing if (record := _alive_or_cleared(settings, name))}
    for name in missing:
        if name not in running:
            _refuse_taken_port(settings, name)
    for name in missing:
        if name not in running:
            running[name] = _start(settings, name, _command(settings, name), _server_address(settings, name))
            begun.append(running[name])
    return _wait_ready(settings, running["prefect"]), _wait_ready(settings, running["mlflow"])


def _bring_up_worker(
    settings: Settings, servers: tuple[ServiceRecord, ServiceRecord], begun: list[ServiceRecord]
) -> ServiceRecord:
    prefect, mlflow = servers
    given = {"PREFECT_API_URL": f"{prefect.address}/api", "MLFLOW_TRACKING_URI": mlflow.address}
    record = _alive_or_cleared(settings, "worker")
    if record is not None and record.given != given:
        # A server has moved to another port: this worker would ask the old one for ever.
        _end(settings, record)
        record = None
    if record is None:
        command = _command(settings, "worker")
        record = _start(settings, "worker", command, given["PREFECT_API_URL"], given)
        begun.append(record)
    return _wait_ready(settings, record)


def _command(settings: Settings, name: ServiceName) -> list[str]:
    module = [sys.executable, "-m"]
    if name == "prefect":
        address = ["--host", settings.host, "--port", str(settings.prefect_port)]
        return [*module, "prefect", "server", "start", *address]
    if name == "mlflow":
        address = ["--host", settings.host, "--port", str(settings.mlflow_port), "--workers", "1"]
        store = ["--backend-store-uri", mlflow_database_uri(settings)]
        # The artifacts' destination serves clients that ask for `mlflow-artifacts:` all the same.
        location = mlflow_artifact_location(settings)
        roots = ["--default-artifact-root", location, "--artifacts-destination", location]
        return [*module, "mlflow", "server", *address, *store, *roots]
    return [
        *module,
        "prefect",
        "worker",
        "start",
        "--pool",
        WORK_POOL,
        "--type",
        "process",
        "--name",
        "local",
    ]


def _start(
    settings: Settings,
    name: ServiceName,
    command: list[str],
    address: str,
    given: dict[str, str] | None = None,
) -> ServiceRecord:
    """Start one service detached and record it before anything else can go wrong."""
    for folder in (settings.services, settings.mlflow_artifacts, settings.prefect_home):
        folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    log = settings.services / f"{name}.log"
    started_at = datetime.now(UTC)
    with log.open("ab") as output:
        # In the home folder, because Prefect reads .env, prefect.toml and pyproject.toml where it is started.
        process = subprocess.Popen(
            command,
            cwd=settings.root,
            env=_environment(settings) | (given or {}) | {TOKEN_VARIABLE: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = ServiceRecord(
        name=name,
        pid=process.pid,
        process_start=process_start(psutil.Process(process.pid)),
        token=token,
        started_at=started_at,
        command=command,
        address=address,
        given=given or {},
        log=log,
        ready=False,
    )
    _write_record(settings, record)
    return record


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of the services: this process's, without where it happens to be connected to."""
    elsewhere = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"}
    inherited = {name: value for name, value in os.environ.items() if name not in elsewhere}
    return inherited | {
        "TUNELINE_HOME": str(settings.root),
        "PREFECT_HOME": str(settings.prefect_home),
        "PREFECT_WORKER_QUERY_SECONDS": WORKER_QUERY_SECONDS,
        # The page asks this address; its default is port 4200 wherever the server listens.
        "PREFECT_SERVER_UI_API_URL": f"{_server_address(settings, 'prefect')}/api",
        # The job runner is eight more processes and 1 GB, for features that Tuneline does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _wait_ready(settings: Settings, record: ServiceRecord) -> ServiceRecord:
    """Wait until the service answers. Raises UserError with the end of its log if it does not."""
    if record.ready:
        return record
    deadline = time.monotonic() + START_SECONDS
    while not _is_healthy(record):
        if not is_alive(record):
            raise _not_started(record, "ended while starting")
        if time.monotonic() > deadline:
            raise _not_started(record, f"did not answer within {START_SECONDS:.0f} s")
        time.sleep(0.2)
    ready = record.model_copy(update={"ready": True})
    _write_record(settings, ready)
    return ready


def _not_started(record: ServiceRecord, what: str) -> UserError:
    tail = textwrap.indent(last_lines(record.log, 20), "    ") or "    (nothing)"
    return UserError(
        f"the {record.name} service {what}; the end of its log is:\n{tail}",
        file=record.log,
        mend="run `tuneline doctor`, mend what the log names, then run `tuneline up` again",
    )


# --- health ------------------------------------------------------------------------------------------------


def _is_healthy(record: ServiceRecord) -> bool:
    if record.name == "worker":
        return _worker_has_reported(record)
    path = "/api/health" if record.name == "prefect" else "/health"
    answer = _ask("GET", f"{record.address}{path}")
    return answer is not None and answer[0] == http.HTTPStatus.OK


def _worker_has_reported(record: ServiceRecord) -> bool:
    """Whether the server has heard this worker, not only one of the same name from an earlier `up`."""
    answer = _ask("POST", f"{record.address}/work_pools/{WORK_POOL}/workers/filter", body=b"{}")
    if answer is None or answer[0] != http.HTTPStatus.OK:
        return False
    heard = [worker for worker in json.loads(answer[1]) if worker["status"] == "ONLINE"]
    times = [datetime.fromisoformat(worker["last_heartbeat_time"]) for worker in heard]
    return any(moment >= record.started_at for moment in times)


def _ask(method: str, url: str, body: bytes | None = None) -> tuple[int, bytes] | None:
    """Status and body of an HTTP request, None if nobody answers within two seconds.

    http.client, because it is light to import and takes no notice of a proxy set for the internet.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request(method, parts.path, body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# --- hosts and ports ---------------------------------------------------------------------------------------


def _refuse_open_host(settings: Settings) -> None:
    if settings.prefect_port == settings.mlflow_port:
        raise UserError(
            "the Prefect and the MLflow server cannot share one port",
            field="TUNELINE_MLFLOW_PORT",
            value=settings.mlflow_port,
            mend="set TUNELINE_MLFLOW_PORT or TUNELINE_PREFECT_PORT to another free port",
        )
    if settings.host == "localhost" or _is_loopback(settings.host):
        return
    raise UserError(
        "the servers would be open to the network without a password",
        field="TUNELINE_HOST",
        value=settings.host,
        expected="a loopback address such as 127.0.0.1",
        mend="unset TUNELINE_HOST and reach the pages from another machine through an SSH tunnel: "
        f"ssh -L {settings.prefect_port}:127.0.0.1:{settings.prefect_port} "
        f"-L {settings.mlflow_port}:127.0.0.1:{settings.mlflow_port} THIS_HOST",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _server_address(settings: Settings, name: ServiceName) -> str:
    port = settings.prefect_port if name == "prefect" else settings.mlflow_port
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}"


def _refuse_taken_port(settings: Settings, name: ServiceName) -> None:
    port = settings.prefect_port if name == "prefect" else settings.mlflow_port
    if not port_is_taken(settings.host, port):
        return
    holder = port_holder(port)
    raise UserError(
        f"port {port}, wanted by the {name} server, is in use by {holder or 'another program'}",
        field=_PORT_VARIABLES[name],
        value=port,
        mend=f"end that program, or choose another port: {_PORT_VARIABLES[name]}={port + 1} tuneline up",
    )


def port_is_taken(host: str, port: int) -> bool:
    """Whether something listens on the port, or the system refuses to bind it."""
    # macOS lets one bind 127.0.0.1:5000 beside AirPlay's *:5000; only a connection shows that.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        if probe.connect_ex((host, port)) == 0:
            return True
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def port_holder(port: int) -> str | None:
    """`pid 123 (name)` of who listens on the port, None if the system does not tell."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.pid is None:
                continue
            if connection.laddr.port == port:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return None
    return None


# --- ending ------------------------------------------------------------------------------------------------


def _alive_or_cleared(settings: Settings, name: ServiceName) -> ServiceRecord | None:
    """The record of a running service; the leftovers of one that has died are cleared away."""
    record = _read_record(settings, name)
    if record is None or is_alive(record):
        return record
    _end(settings, record)
    return None


def _end(settings: Settings, record: ServiceRecord) -> bool:
    """End the service's whole process tree and forget it. Returns whether anything was running."""
    ended = end_tree(record, STOP_SECONDS, settings.grace_seconds + STOP_SECONDS)
    if ended.left:
        raise UserError(
            f"the {record.name} service does not end; the system holds its processes {list(ended.left)}",
            file=_record_path(settings, record.name),
            mend="see what they wait for (ps -o pid,stat,wchan), then run `tuneline down` again",
        )
    if record.name == "worker" and ended.found:
        _report_ended_runs(record.address, ended.found)
    _record_path(settings, record.name).unlink(missing_ok=True)
    return bool(ended.found)


def _report_ended_runs(prefect_api: str, ended: frozenset[int]) -> None:
    """Tell the Prefect server which flow runs ended with their worker.

    A flow run of a worker does not live to report SIGTERM; its worker does that, and is gone as well. Without
    this the run would be shown as running for ever.
    """
    unfinished = {
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
        "work_pools": {"name": {"any_": [WORK_POOL]}},
    }
    answer = _ask("POST", f"{prefect_api}/flow_runs/filter", body=json.dumps(unfinished).encode())
    if answer is None or answer[0] != http.HTTPStatus.OK:
        return
    # Prefect's workers write the bare process id, or the host before it.
    ours = {name for pid in ended for name in (str(pid), f"{socket.gethostname()}:{pid}")}
    state = {"type": "CRASHED", "name": "Crashed", "message": "The worker was ended (`tuneline down`)."}
    body = json.dumps({"state": state, "force": True}).encode()
    for run in json.loads(answer[1]):
        if run["infrastructure_pid"] in ours:
            _ask("POST", f"{prefect_api}/flow_runs/{run['id']}/set_state", body=body)


# --- records -----------------------------------------------------------------------------------------------


def _record_path(settings: Settings, name: ServiceName) -> Path:
    return settings.services / f"{name}.json"


def _read_record(settings: Settings, name: ServiceName) -> ServiceRecord | None:
    path = _record_path(settings, name)
    try:
        return ServiceRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"this record of a started server cannot be read: {error.errors()[0]['msg']}",
            file=path,
            mend="end the server by hand if it runs, then delete this file",
        ) from error


def _write_record(settings: Settings, record: ServiceRecord) -> None:
    write_record(_record_path(settings, record.name), record, private=True)


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Let one `up` or `down` work at a time; the system frees the lock even if its holder is killed."""
    settings.services.mkdir(parents=True, exist_ok=True)
    with (settings.services / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _running(settings: Settings, name: ServiceName) -> ServiceRecord | None:
    record = _read_record(settings, name)
    return record if record is not None and record.ready and is_alive(record) else None


def _told(record: ServiceRecord, state: ServiceState) -> ServiceStatus:
    return ServiceStatus(name=record.name, state=state, pid=record.pid, address=record.address, log=record.log)


def _point(name: str, value: str | None) -> None:
    """Set or unset an address, unless somebody other than `connect` has set it."""
    if name in os.environ and os.environ[name] != _set_by_connect.get(name):
        return
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
        _set_by_connect[name] = value

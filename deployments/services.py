"""The Prefect server, the MLflow server and workers, started and ended as `tuneline up` and `down`.

Each runs detached, in a session of its own, with a record in `settings.services`. Only what has a record is
ever ended, and only if the process found under its id is the one that was started.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from configs.errors import UserError
from configs.services import Addresses, ServiceName, ServiceRecord, ServiceState, ServiceStatus
from configs.settings import Settings, apply_environment
from deployments.asking import artifact_location, is_healthy, report_crashed, takes_us
from deployments.credentials import (
    CLIENT_VARIABLES,
    Credentials,
    client_environment,
    find_credentials,
    keep_credentials,
    kept_credentials,
    require_credentials,
)
from deployments.databases import EXPERIMENT, mlflow_database_uri, prefect_database_uri
from deployments.flow_deployments import deploy_flows
from deployments.ports import ServerName, refuse_one_port_for_both, refuse_taken_port, server_address
from deployments.processes import TOKEN_VARIABLE, end_tree, flow_runs_below, is_alive
from deployments.service_records import (
    all_records,
    forget_record,
    locked,
    read_record,
    record_path,
    recorded_pools,
    running,
    write_record,
)
from deployments.starting import prepare, service_command, service_environment
from deployments.work_pools import WORK_POOL, checked_pool
from tasks.files import last_lines
from tasks.processes import process_start

SERVERS: tuple[ServerName, ...] = ("prefect", "mlflow")
START_SECONDS = 180.0
# A server has nothing to save; a worker's flow runs get `grace_seconds` for their checkpoints instead.
STOP_SECONDS = 10.0

_EXAMPLES = {
    "PREFECT_API_URL": "http://gpu-server.lan:4200/api",
    "MLFLOW_TRACKING_URI": "http://gpu-server.lan:5000",
}
_REFUSALS: dict[int | None, tuple[str, str]] = {
    None: (
        "nobody answers at the server's address",
        "see there with `tuneline status` whether it runs, and whether its port can be reached from here",
    ),
    401: (
        "the server refuses the credentials",
        "set TUNELINE_USER and TUNELINE_PASSWORD to those that it was started with",
    ),
    403: (
        "the server does not answer to this name",
        "on the server, set TUNELINE_PUBLIC_HOST to the name used here, then `tuneline down` and `tuneline up`",
    ),
}

_set_by_connect: dict[str, str] = {}


# --- the verbs ---------------------------------------------------------------------------------------------


def up(settings: Settings) -> list[ServiceStatus]:
    """Start whichever of the three is missing, wait until all answer, deploy the flows; harmless if they run already.

    Raises UserError if the host is open to the network without credentials, a port is taken, or one does not become
    healthy; what this call had started is then ended again.
    """
    refuse_one_port_for_both(settings)
    credentials = require_credentials(settings)
    for check in (prefect_database_uri, mlflow_database_uri):
        check(settings)  # a mistake is told before anything starts
    apply_environment(settings)
    _use(credentials)
    with locked(settings):
        _refuse_other_credentials(settings, credentials)
        begun: list[ServiceRecord] = []
        try:
            prefect, mlflow = _bring_up_servers(settings, credentials, begun)
            worker = _bring_up_pool(settings, WORK_POOL, _addresses_of(prefect, mlflow), credentials, begun)
        except BaseException:
            for record in reversed(begun):
                _end(settings, record)
            raise
    return _told_all([prefect, mlflow, worker], begun)


def join(settings: Settings, pool: str) -> list[ServiceStatus]:
    """Start a worker of `pool` on this host, for servers that run elsewhere; harmless if it runs already.

    The servers are those that PREFECT_API_URL and MLFLOW_TRACKING_URI name, else those of this host. The work pool is
    made if it is missing, and the flows are deployed on it. Raises UserError if a server is not named, does not
    answer, or refuses the credentials.
    """
    checked_pool(pool)
    credentials = find_credentials(settings)
    given = _servers_elsewhere(settings)
    apply_environment(settings)
    _use(credentials)
    _refuse_unanswered(settings, given)
    _refuse_unreachable_artifacts(settings, given["MLFLOW_TRACKING_URI"])
    with locked(settings):
        _refuse_other_credentials(settings, credentials)
        begun: list[ServiceRecord] = []
        try:
            if credentials is not None:
                keep_credentials(settings, credentials)
            worker = _bring_up_pool(settings, pool, given, credentials, begun)
        except BaseException:
            for record in begun:
                _end(settings, record)
            raise
    return _told_all([worker], begun)


def down(settings: Settings) -> list[ServiceStatus]:
    """End what `up` started on this host, with every process below it, and nothing else; harmless if nothing runs.

    Flow runs of a worker are ended first and have `settings.grace_seconds` to save their checkpoints. What systemd
    keeps running is left to it. Raises UserError if a process cannot be ended.
    """
    if not settings.services.is_dir():
        return [ServiceStatus(name=name, pool=pool, state="not running") for name, pool in _known(settings)]
    with locked(settings):
        return [_put_down(settings, name, pool) for name, pool in reversed(_known(settings))][::-1]


def status(settings: Settings) -> list[ServiceStatus]:
    """How each service of this host is now. Changes nothing."""
    told = []
    for name, pool in _known(settings):
        record = read_record(settings, name, pool)
        if record is None or not is_alive(record):
            told.append(ServiceStatus(name=name, pool=pool, state="not running"))
        else:
            told.append(_told(record, "running" if is_healthy(settings, record) else "not answering"))
    return told


def addresses(settings: Settings) -> Addresses:
    """Where the servers answer: those of this host, else those that a worker of this host was joined to.

    Cheap: reads the records and looks at the processes only.
    """
    prefect, mlflow = running(settings, "prefect"), running(settings, "mlflow")
    if prefect is None and mlflow is None:
        for pool in recorded_pools(settings):
            worker = running(settings, "worker", pool)
            if worker is not None:
                return _of_worker(worker)
    return Addresses(
        prefect_api=f"{prefect.address}/api" if prefect else None,
        prefect_ui=prefect.address if prefect else None,
        mlflow=mlflow.address if mlflow else None,
    )


def connect(settings: Settings) -> Addresses:
    """Point this process at the running servers, or at the embedded ones on the same databases.

    To be called before `prefect` or `mlflow` is imported: both read their environment then. An address or a
    credential that somebody else has put into the environment (a team's own server) is left alone.
    """
    apply_environment(settings)
    found = addresses(settings)
    # Not setdefault: an embedded run must land in the database that `tuneline up` shows.
    os.environ["PREFECT_HOME"] = str(settings.prefect_home)
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    # The first embedded run creates the database, which on a small machine takes nearly the default 20 s.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")
    _point("PREFECT_API_URL", found.prefect_api)
    _point("PREFECT_API_DATABASE_CONNECTION_URL", None if found.prefect_api else prefect_database_uri(settings))
    settings.mlflow_sqlite.parent.mkdir(parents=True, exist_ok=True)
    _point("MLFLOW_TRACKING_URI", found.mlflow or mlflow_database_uri(settings))
    _use(find_credentials(settings))
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
            "  Experiments  > tuneline > Views > Trains: parameters and figures; tick several > Compare: side by side",
            "  Models       > what was trained, and from what",
        ]
    return "\n".join([*lines, "Stop what runs on this host: tuneline down"])


# --- starting ----------------------------------------------------------------------------------------------


def _bring_up_servers(
    settings: Settings, credentials: Credentials | None, begun: list[ServiceRecord]
) -> tuple[ServiceRecord, ServiceRecord]:
    """Both servers healthy; they take ten seconds each, so they start side by side."""
    found = {name: record for name in SERVERS if (record := _alive_or_cleared(settings, name))}
    missing = [name for name in SERVERS if name not in found]
    for name in missing:
        refuse_taken_port(settings, name)
    for name in missing:
        prepare(settings, name, credentials)
    if credentials is not None:
        keep_credentials(settings, credentials)
    for name in missing:
        found[name] = _start(settings, name, server_address(settings, name), credentials)
        begun.append(found[name])
    return _wait_ready(settings, found["prefect"]), _wait_ready(settings, found["mlflow"])


def _bring_up_pool(
    settings: Settings,
    pool: str,
    given: dict[str, str],
    credentials: Credentials | None,
    begun: list[ServiceRecord],
) -> ServiceRecord:
    """The pool with its deployments, and a worker of this host for it."""
    for variable, address in given.items():
        _point(variable, address)  # deploying imports Prefect, which reads its server's address once
    deploy_flows(settings, given["PREFECT_API_URL"], pool)
    record = _alive_or_cleared(settings, "worker", pool)
    if record is not None and record.given != given and not record.supervised:
        # A server has moved to another port: this worker would ask the old one for ever.
        _end(settings, record)
        record = None
    if record is None:
        prepare(settings, "worker", credentials)
        record = _start(settings, "worker", given["PREFECT_API_URL"], credentials, pool, given)
        begun.append(record)
    return _wait_ready(settings, record)


def _start(
    settings: Settings,
    name: ServiceName,
    address: str,
    credentials: Credentials | None,
    pool: str | None = None,
    given: dict[str, str] | None = None,
) -> ServiceRecord:
    """Start one service detached and record it before anything else can go wrong."""
    command = service_command(settings, name, pool or WORK_POOL, credentials)
    token = uuid.uuid4().hex
    log = record_path(settings, name, pool).with_suffix(".log")
    started_at = datetime.now(UTC)
    with log.open("ab") as output:
        # In the home folder, because Prefect reads .env, prefect.toml and pyproject.toml where it is started.
        process = subprocess.Popen(
            command,
            cwd=settings.root,
            env=service_environment(settings, name, credentials, given or {}) | {TOKEN_VARIABLE: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = ServiceRecord(
        name=name,
        pool=pool,
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
    write_record(settings, record)
    return record


def _wait_ready(settings: Settings, record: ServiceRecord) -> ServiceRecord:
    """Wait until the service answers. Raises UserError with the end of its log if it does not."""
    if record.ready:
        return record
    deadline = time.monotonic() + START_SECONDS
    while not is_healthy(settings, record):
        if not is_alive(record):
            raise _not_started(record, "ended while starting")
        if time.monotonic() > deadline:
            raise _not_started(record, f"did not answer within {START_SECONDS:.0f} s")
        time.sleep(0.2)
    ready = record.model_copy(update={"ready": True})
    write_record(settings, ready)
    return ready


def _not_started(record: ServiceRecord, what: str) -> UserError:
    tail = textwrap.indent(last_lines(record.log, 20) if record.log else "", "    ") or "    (nothing)"
    return UserError(
        f"the {record.label} service {what}; the end of its log is:\n{tail}",
        file=record.log,
        mend="run `tuneline doctor`, mend what the log names, then run `tuneline up` again",
    )


# --- what is refused ---------------------------------------------------------------------------------------


def _refuse_other_credentials(settings: Settings, credentials: Credentials | None) -> None:
    """What runs was given the credentials that are kept: others would lock each out from the other."""
    kept = kept_credentials(settings)
    same = credentials == kept or (credentials is not None and kept is not None and credentials.same_as(kept))
    if same or not any(is_alive(record) for record in all_records(settings)):
        return
    raise UserError(
        "what runs on this host was started with other credentials" if kept else "what runs here has no credentials",
        field="TUNELINE_PASSWORD",
        mend="tuneline down, then tuneline up with the new ones (or unset TUNELINE_USER and TUNELINE_PASSWORD)",
    )


def _servers_elsewhere(settings: Settings) -> dict[str, str]:
    """The addresses that a worker is to be given. Raises UserError if one is missing or is no address of a server."""
    own = addresses(settings)
    found = {
        "PREFECT_API_URL": os.environ.get("PREFECT_API_URL") or own.prefect_api,
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or own.mlflow,
    }
    return {name: _checked_address(name, address) for name, address in found.items()}


def _checked_address(name: str, address: str | None) -> str:
    example = _EXAMPLES[name]
    if not address:
        raise UserError(
            "a worker needs to know its servers, and none run on this host",
            field=name,
            expected=f"the server's address, such as {example}",
            mend=f"export {name}={example}",
        )
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise UserError(
            "an address with a password in it would be recorded and shown",
            field=name,
            mend="give user and password as TUNELINE_USER and TUNELINE_PASSWORD",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("this is no address of a server", field=name, value=address, expected=f"such as {example}")
    return address.rstrip("/")


def _refuse_unanswered(settings: Settings, given: dict[str, str]) -> None:
    for name, answered in takes_us(settings, given["PREFECT_API_URL"], given["MLFLOW_TRACKING_URI"]).items():
        if answered == 200:
            continue
        what, mend = _REFUSALS.get(
            answered, (f"this is not the server's API: it answered {answered}", f"an address such as {_EXAMPLES[name]}")
        )
        raise UserError(what, field=name, value=given[name], mend=mend)


def _refuse_unreachable_artifacts(settings: Settings, mlflow: str) -> None:
    """Files on the server's own disk would be written to a folder of the same name here, and never be seen again."""
    location = artifact_location(settings, mlflow, EXPERIMENT) or ""
    folder = Path(unquote(urlsplit(location).path))
    if urlsplit(location).scheme == "file" and not os.access(folder, os.W_OK):
        raise UserError(
            f"the MLflow server keeps its files in {folder} of its own host, which this host cannot write to",
            field="MLFLOW_TRACKING_URI",
            value=mlflow,
            mend="on the server, set TUNELINE_PUBLIC_HOST to its name, then `tuneline down` and `tuneline up`: it "
            "sends files through itself then",
        )


# --- ending ------------------------------------------------------------------------------------------------


def _alive_or_cleared(settings: Settings, name: ServiceName, pool: str | None = None) -> ServiceRecord | None:
    """The record of a running service; the leftovers of one that has died are cleared away."""
    record = read_record(settings, name, pool)
    if record is None or is_alive(record):
        return record
    _end(settings, record)
    return None


def _put_down(settings: Settings, name: ServiceName, pool: str | None) -> ServiceStatus:
    record = read_record(settings, name, pool)
    if record is not None and record.supervised and is_alive(record):
        return _told(record, "left to its supervisor")
    ended = _end(settings, record) if record is not None else False
    return ServiceStatus(name=name, pool=pool, state="stopped" if ended else "not running")


def _end(settings: Settings, record: ServiceRecord) -> bool:
    """End the service's whole process tree and forget it. Returns whether anything was running."""
    flow_runs = flow_runs_below(record) if record.name == "worker" else frozenset()
    ended = end_tree(record, STOP_SECONDS, settings.grace_seconds + STOP_SECONDS)
    if ended.left:
        raise UserError(
            f"the {record.label} service does not end; the system holds its processes {list(ended.left)}",
            file=record_path(settings, record.name, record.pool),
            mend="see what they wait for (ps -o pid,stat,wchan), then run `tuneline down` again",
        )
    report_crashed(settings, record.address, flow_runs)
    forget_record(settings, record)
    return bool(ended.found)


# --- telling -----------------------------------------------------------------------------------------------


def _known(settings: Settings) -> list[tuple[ServiceName, str | None]]:
    """The servers, and the workers that this host has records of; the usual one if it has none."""
    pools = recorded_pools(settings) or [WORK_POOL]
    return [("prefect", None), ("mlflow", None), *(("worker", pool) for pool in pools)]


def _addresses_of(prefect: ServiceRecord, mlflow: ServiceRecord) -> dict[str, str]:
    return {"PREFECT_API_URL": f"{prefect.address}/api", "MLFLOW_TRACKING_URI": mlflow.address}


def _of_worker(worker: ServiceRecord) -> Addresses:
    return Addresses(
        prefect_api=worker.given["PREFECT_API_URL"],
        prefect_ui=worker.given["PREFECT_API_URL"].removesuffix("/api"),
        mlflow=worker.given["MLFLOW_TRACKING_URI"],
    )


def _told_all(records: list[ServiceRecord], begun: list[ServiceRecord]) -> list[ServiceStatus]:
    new = {record.label for record in begun}
    return [_told(record, "started" if record.label in new else "already running") for record in records]


def _told(record: ServiceRecord, state: ServiceState) -> ServiceStatus:
    return ServiceStatus(
        name=record.name, pool=record.pool, state=state, pid=record.pid, address=record.address, log=record.log
    )


def _use(credentials: Credentials | None) -> None:
    """Let the clients of this process show these credentials."""
    secrets = client_environment(credentials)
    for variable in CLIENT_VARIABLES:
        _point(variable, secrets.get(variable))


def _point(name: str, value: str | None) -> None:
    """Set or unset a variable, unless somebody other than `connect` has set it."""
    if name in os.environ and os.environ[name] != _set_by_connect.get(name):
        return
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
        _set_by_connect[name] = value

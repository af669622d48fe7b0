"""One service in the foreground, for a supervisor such as systemd: `tuneline serve prefect|mlflow|worker`."""

from __future__ import annotations

import os
import time
import uuid
from datetime import UTC, datetime
from typing import NoReturn

import psutil

from configs.errors import UserError
from configs.services import ServiceName, ServiceRecord
from configs.settings import Settings, apply_environment
from deployments.asking import takes_us
from deployments.credentials import client_environment, keep_credentials, require_credentials
from deployments.flow_deployments import deploy_flows
from deployments.ports import refuse_one_port_for_both, refuse_taken_port, server_address
from deployments.processes import TOKEN_VARIABLE, is_alive
from deployments.service_records import locked, read_record, write_record
from deployments.starting import prepare, service_command, service_environment
from deployments.work_pools import checked_pool
from tasks.processes import process_start

SERVERS_SECONDS = 180.0  # as long as a worker waits for its servers: after a reboot all start at once


def serve(settings: Settings, name: ServiceName, pool: str) -> NoReturn:
    """Become the service: this process is replaced by it, with its id, and a record that `down` leaves alone.

    A worker waits for its servers (those of PREFECT_API_URL and MLFLOW_TRACKING_URI, else this host's) and deploys the
    flows of its pool first. Raises UserError if the service runs already or cannot be started.
    """
    refuse_one_port_for_both(settings)
    credentials = require_credentials(settings)
    apply_environment(settings)
    given: dict[str, str] = {}
    if name == "worker":
        checked_pool(pool)
        os.environ.update(client_environment(credentials))
        given = _wait_for_servers(settings)
        deploy_flows(settings, given["PREFECT_API_URL"], pool)
    with locked(settings):
        _refuse_running(settings, name, pool)
        if name != "worker":
            refuse_taken_port(settings, name)
        prepare(settings, name, credentials)
        # MLflow's user is set by `prepare`, from what differs from the kept pair: its turn to keep it.
        if credentials is not None and name != "prefect":
            keep_credentials(settings, credentials)
        command = service_command(settings, name, pool, credentials)
        record = _own_record(settings, name, pool, given, command)
        write_record(settings, record)
    environment = service_environment(settings, name, credentials, given) | {TOKEN_VARIABLE: record.token}
    os.chdir(settings.root)  # Prefect reads .env, prefect.toml and pyproject.toml where it is started
    os.execve(record.command[0], record.command, environment)  # noqa: S606 - an argument list


def _own_record(
    settings: Settings, name: ServiceName, pool: str, given: dict[str, str], command: list[str]
) -> ServiceRecord:
    return ServiceRecord(
        name=name,
        pool=pool if name == "worker" else None,
        pid=os.getpid(),
        process_start=process_start(psutil.Process()),
        token=uuid.uuid4().hex,
        started_at=datetime.now(UTC),
        command=command,
        address=given["PREFECT_API_URL"] if name == "worker" else server_address(settings, name),
        given=given,
        log=None,
        ready=False,
        supervised=True,
    )


def _refuse_running(settings: Settings, name: ServiceName, pool: str) -> None:
    found = read_record(settings, name, pool if name == "worker" else None)
    if found is not None and is_alive(found):
        raise UserError(
            f"the {found.label} service of this home runs already, as pid {found.pid}",
            mend="tuneline down, or systemctl stop, whichever started it",
        )


def _wait_for_servers(settings: Settings) -> dict[str, str]:
    given = {
        "PREFECT_API_URL": os.environ.get("PREFECT_API_URL") or f"{server_address(settings, 'prefect')}/api",
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or server_address(settings, "mlflow"),
    }
    deadline = time.monotonic() + SERVERS_SECONDS
    while True:
        answers = takes_us(settings, given["PREFECT_API_URL"], given["MLFLOW_TRACKING_URI"])
        bad = [name for name, status in answers.items() if status != 200]
        if not bad:
            return given
        if time.monotonic() > deadline:
            raise UserError(
                f"the server did not take this worker within {SERVERS_SECONDS:.0f} s (last answer: {answers[bad[0]]})",
                field=bad[0],
                value=given[bad[0]],
                mend="see whether it runs and whether TUNELINE_USER and TUNELINE_PASSWORD are its own",
            )
        time.sleep(1)

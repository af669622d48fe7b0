"""Small requests to the servers: are they there, do they take our credentials, which workers have they heard."""

from __future__ import annotations

import http.client
import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from configs.services import ServiceRecord
from configs.settings import Settings
from deployments.credentials import authorization, find_credentials

_SECONDS = 5


class Answer(NamedTuple):
    """An HTTP answer; `date` is the server's clock, where it tells it."""

    status: int
    body: bytes
    date: datetime | None


def ask(settings: Settings, method: str, url: str, body: Any = None) -> Answer | None:
    """Ask a server with our credentials; None if nobody answers within a few seconds.

    http.client, because it is light to import and takes no notice of a proxy set for the internet.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", **authorization(find_credentials(settings))}
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
    except http.client.InvalidURL:
        return None
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers)
        response = connection.getresponse()
        told = response.getheader("Date")
        return Answer(response.status, response.read(), parsedate_to_datetime(told) if told else None)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def is_healthy(settings: Settings, record: ServiceRecord) -> bool:
    """Whether a server answers, or the Prefect server has heard the worker since it was started."""
    if record.name == "worker":
        return _worker_has_reported(settings, record)
    answer = ask(settings, "GET", f"{record.address}{'/api/health' if record.name == 'prefect' else '/health'}")
    return answer is not None and answer.status == http.HTTPStatus.OK


def takes_us(settings: Settings, prefect_api: str, mlflow: str) -> dict[str, int | None]:
    """The status that each server answers a request with that needs credentials; None where nobody answers."""
    prefect = ask(settings, "POST", f"{prefect_api}/work_pools/filter", body={"limit": 1})
    experiments = ask(settings, "POST", f"{mlflow}/api/2.0/mlflow/experiments/search", body={"max_results": 1})
    return {"PREFECT_API_URL": prefect and prefect.status, "MLFLOW_TRACKING_URI": experiments and experiments.status}


def artifact_location(settings: Settings, mlflow: str, experiment: str) -> str | None:
    """Where the MLflow server keeps the files of an experiment; None if it has no such experiment."""
    address = f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}"
    answer = ask(settings, "GET", address)
    if answer is None or answer.status != http.HTTPStatus.OK:
        return None
    return str(json.loads(answer.body)["experiment"]["artifact_location"])


def _worker_has_reported(settings: Settings, record: ServiceRecord) -> bool:
    """Whether the server has heard this worker, not only one of the same name from an earlier `up`."""
    asked = datetime.now(UTC)
    answer = ask(settings, "POST", f"{record.address}/work_pools/{record.pool}/workers/filter", body={})
    if answer is None or answer.status != http.HTTPStatus.OK:
        return False
    # Heartbeats have the server's time, the record has ours; the header's is in whole seconds.
    behind = asked - answer.date if answer.date is not None else timedelta()
    if abs(behind) < timedelta(seconds=2):
        behind = timedelta()
    heard = [
        datetime.fromisoformat(worker["last_heartbeat_time"]) + behind
        for worker in json.loads(answer.body)
        if worker["status"] == "ONLINE" and worker["name"] == socket.gethostname()
    ]
    return any(moment >= record.started_at for moment in heard)


def report_crashed(settings: Settings, prefect_api: str, flow_runs: frozenset[str]) -> None:
    """Tell the Prefect server of flow runs that ended with their worker.

    A flow run of a worker does not live to report SIGTERM; its worker does that, and is gone as well. Without this
    the run would be shown as running for ever.
    """
    state = {"type": "CRASHED", "name": "Crashed", "message": "The worker was ended (`tuneline down`)."}
    for run in flow_runs:
        answer = ask(settings, "GET", f"{prefect_api}/flow_runs/{run}")
        if answer is None or answer.status != http.HTTPStatus.OK:
            continue
        if json.loads(answer.body)["state"]["type"] in ("PENDING", "RUNNING", "CANCELLING"):
            ask(settings, "POST", f"{prefect_api}/flow_runs/{run}/set_state", body={"state": state, "force": True})

"""The command and the environment of each service, whether `tuneline up` starts it or systemd does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from configs.errors import UserError
from configs.services import ServiceName
from configs.settings import PROJECT_ROOT, Settings
from deployments.credentials import (
    CLIENT_VARIABLES,
    OWN_VARIABLES,
    Credentials,
    client_environment,
    kept_credentials,
)
from deployments.databases import (
    PROXIED_ARTIFACTS,
    mlflow_database_uri,
    mlflow_users_uri,
    prefect_database_uri,
    share_artifacts,
)
from deployments.mlflow_users import write_configuration
from deployments.ports import is_shared, public_host, server_address

WORKER_QUERY_SECONDS = "2"
# The automation that finds flow runs whose host is gone waits for three of these. Prefect takes nothing shorter.
HEARTBEAT_SECONDS = "30"


def service_command(settings: Settings, name: ServiceName, pool: str, credentials: Credentials | None) -> list[str]:
    """The argument list of a service; it holds no secret."""
    module = [sys.executable, "-m"]
    if name == "prefect":
        address = ["--host", settings.host, "--port", str(settings.prefect_port)]
        return [*module, "prefect", "server", "start", *address]
    if name == "mlflow":
        return [*module, "mlflow", "server", *_mlflow_options(settings, credentials)]
    # Named after the host: two hosts in one pool are two workers on the page.
    return [
        *module,
        "prefect",
        "worker",
        "start",
        "--pool",
        pool,
        "--type",
        "process",
        "--name",
        socket.gethostname(),
    ]


def _mlflow_options(settings: Settings, credentials: Credentials | None) -> list[str]:
    """The store's address is not among them: it may hold a password, and goes by environment."""
    files = settings.mlflow_artifacts.as_uri()
    # The artifacts' destination serves clients that ask for `mlflow-artifacts:`.
    roots = ["--default-artifact-root", PROXIED_ARTIFACTS if is_shared(settings) else files]
    options = ["--host", settings.host, "--port", str(settings.mlflow_port), "--workers", "1"]
    options += [*roots, "--artifacts-destination", files]
    if credentials is not None:
        options += ["--app-name", "basic-auth"]
    if is_shared(settings):
        names = {public_host(settings), "localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
        allowed = sorted({*names, *(f"{name}:*" for name in names)})
        options += ["--allowed-hosts", ",".join(allowed)]
        # The page's own requests: without it the browser's would be taken for another site's.
        options += ["--cors-allowed-origins", server_address(settings, "mlflow")]
    return options


def prepare(settings: Settings, name: ServiceName, credentials: Credentials | None) -> None:
    """What a service expects to find: folders, the user of MLflow, artifacts that other hosts can reach.

    Raises UserError if MLflow's users cannot be changed.
    """
    for folder in (settings.services, settings.mlflow_artifacts, settings.prefect_home):
        folder.mkdir(parents=True, exist_ok=True)
    if name != "mlflow":
        return
    share_artifacts(settings)
    kept = kept_credentials(settings)
    if credentials is not None and (kept is None or not credentials.same_as(kept)):
        _set_mlflow_user(settings, credentials, kept.user if kept is not None else None)


def _set_mlflow_user(settings: Settings, credentials: Credentials, former: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.mlflow_users", *([former] if former else [])],
        cwd=settings.root,
        env=service_environment(settings, "mlflow", credentials, {"PYTHONPATH": str(PROJECT_ROOT)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise UserError(
            f"the user of the MLflow server could not be set: {reason}",
            field="TUNELINE_USER",
            value=credentials.user,
            mend="mend what the reason names, then run `tuneline up` again",
        )


def service_environment(
    settings: Settings, name: ServiceName, credentials: Credentials | None, given: dict[str, str]
) -> dict[str, str]:
    """The environment of a service: this process's, without where it happens to be connected to, and with `given`.

    Each gets the secrets it needs and no others: a worker no database, a server nobody else's password.
    """
    elsewhere = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", *CLIENT_VARIABLES, *OWN_VARIABLES}
    inherited = {variable: value for variable, value in os.environ.items() if variable not in elsewhere}
    own = {"prefect": _of_prefect, "mlflow": _of_mlflow, "worker": _of_worker}[name]
    return inherited | {
        "TUNELINE_HOME": str(settings.root),
        "PREFECT_HOME": str(settings.prefect_home),
        # The worker starts `python`, by the template of its work pool: it is to be the one of this installation.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        **own(settings, credentials),
        **given,
    }


def _of_prefect(settings: Settings, credentials: Credentials | None) -> dict[str, str]:
    # The page asks this address; its default is port 4200 wherever the server listens.
    environment = {
        "PREFECT_SERVER_UI_API_URL": f"{server_address(settings, 'prefect')}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    if credentials is not None:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = client_environment(credentials)["PREFECT_API_AUTH_STRING"]
        # The server's own services (automations that start runs) are clients of it.
        environment["PREFECT_API_AUTH_STRING"] = environment["PREFECT_SERVER_API_AUTH_STRING"]
    database = prefect_database_uri(settings)
    return environment | ({"PREFECT_API_DATABASE_CONNECTION_URL": database} if database else {})


def _of_mlflow(settings: Settings, credentials: Credentials | None) -> dict[str, str]:
    environment = {
        "MLFLOW_BACKEND_STORE_URI": mlflow_database_uri(settings),
        # The job runner is eight more processes and 1 GB, for features that Tuneline does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if credentials is None:
        return environment
    return environment | {
        "MLFLOW_AUTH_CONFIG_PATH": str(write_configuration(settings, mlflow_users_uri(settings))),
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password.get_secret_value(),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.mlflow_key.get_secret_value(),
    }


def _of_worker(settings: Settings, credentials: Credentials | None) -> dict[str, str]:
    return {
        "PREFECT_WORKER_QUERY_SECONDS": WORKER_QUERY_SECONDS,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT_SECONDS,
        **client_environment(credentials),
    }

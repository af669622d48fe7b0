"""Which host and ports the servers bind to, how they are reached, and who holds a port."""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal

import psutil

from configs.errors import UserError
from configs.settings import Settings

ServerName = Literal["prefect", "mlflow"]

_PORT_VARIABLES = {"prefect": "TUNELINE_PREFECT_PORT", "mlflow": "TUNELINE_MLFLOW_PORT"}


def is_open_to_the_network(settings: Settings) -> bool:
    """Whether others than this host can reach the servers: then they need credentials."""
    if settings.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return True


def is_shared(settings: Settings) -> bool:
    """Whether the servers are meant for other hosts as well, directly or through a tunnel or proxy."""
    return is_open_to_the_network(settings) or settings.public_host is not None


def public_host(settings: Settings) -> str:
    """The name or address by which browsers, other hosts and this one reach the servers.

    One name for all, because links in runs and pages are made from it. Raises UserError if this host does not know
    its own name.
    """
    if settings.public_host is not None:
        return settings.public_host
    if settings.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return settings.host
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UserError(
            f"the servers would bind to every address, and this host's name cannot be resolved: {error}",
            field="TUNELINE_PUBLIC_HOST",
            expected="the name or address by which other hosts reach this one",
            mend="TUNELINE_PUBLIC_HOST=gpu-host.lan tuneline up",
        ) from error
    return name


def server_port(settings: Settings, name: ServerName) -> int:
    """The port of a server."""
    return settings.prefect_port if name == "prefect" else settings.mlflow_port


def server_address(settings: Settings, name: ServerName) -> str:
    """The address of a server, without a path."""
    host = public_host(settings)
    return f"http://{f'[{host}]' if ':' in host else host}:{server_port(settings, name)}"


def refuse_one_port_for_both(settings: Settings) -> None:
    """Raises UserError if both servers are to have the same port."""
    if settings.prefect_port == settings.mlflow_port:
        raise UserError(
            "the Prefect and the MLflow server cannot share one port",
            field="TUNELINE_MLFLOW_PORT",
            value=settings.mlflow_port,
            mend="set TUNELINE_MLFLOW_PORT or TUNELINE_PREFECT_PORT to another free port",
        )


def refuse_taken_port(settings: Settings, name: ServerName) -> None:
    """Raises UserError, naming the holder, if another program has the server's port."""
    port = server_port(settings, name)
    if not port_is_taken(settings.host, port):
        return
    raise UserError(
        f"port {port}, wanted by the {name} server, is in use by {port_holder(port) or 'another program'}",
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

"""systemd units for a server, or a worker's host, that stays: `tuneline up --systemd FOLDER`.

The units hold no secret: those are in an environment file beside them that only its owner may read.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from configs.services import ServiceName
from configs.settings import Settings
from deployments.credentials import require_credentials
from deployments.work_pools import WORK_POOL, checked_pool
from tasks.files import write_text

ENVIRONMENT_FILE = "tuneline.env"
# A host that joins is told where the servers are by the same names that their clients read.
_JOINED = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")

_UNIT = """\
# Written by `tuneline up --systemd`.
[Unit]
Description=Tuneline: {description}
After=network-online.target{after}
Wants=network-online.target

[Service]
Type=exec
User={user}
EnvironmentFile={environment}
ExecStart={command}
Restart=always
RestartSec=5
NoNewPrivileges=yes
UMask=0077
KillSignal=SIGTERM
{killing}

[Install]
WantedBy=multi-user.target
"""
# The leader ends its children in order; what is left after the time is killed with it.
_KILL_SERVER = "KillMode=mixed\nTimeoutStopSec=30"
# The worker alone: a train that runs goes on, and is found by the next worker's server. Cancel it on the page first
# if the host is to be shut down; at a shutdown systemd ends everything anyway, and the checkpoint is resumed from.
_KILL_WORKER = "KillMode=process\nTimeoutStopSec=30"


def write_units(settings: Settings, folder: Path, joined_pool: str | None) -> list[Path]:
    """Write the units and, unless it is there, the environment file; returns what was written.

    Without `joined_pool`, both servers and a worker of the usual pool; with it, one worker for servers elsewhere.
    Raises UserError if the servers would be open without credentials.
    """
    folder = folder.expanduser().resolve()
    if joined_pool is None:
        require_credentials(settings)
    services: list[tuple[ServiceName, str]] = [("worker", checked_pool(joined_pool or WORK_POOL))]
    if joined_pool is None:
        services = [("prefect", ""), ("mlflow", ""), *services]
    environment = folder / ENVIRONMENT_FILE
    written = []
    if not environment.exists():  # an operator may have changed it
        write_text(environment, _environment(settings), private=True)
        written.append(environment)
    for name, pool in services:
        path = folder / f"tuneline-{name}{f'-{pool}' if pool else ''}.service"
        write_text(path, _unit(name, pool, environment, with_servers=joined_pool is None))
        path.chmod(0o644)
        written.append(path)
    return written


def how_to_install(written: list[Path]) -> str:
    """The commands that are left to do."""
    units = [path for path in written if path.suffix == ".service"]
    names = " ".join(path.name for path in units)
    return "\n".join(
        [
            *(f"written: {path}" for path in written),
            f"Look at {units[0].parent / ENVIRONMENT_FILE}, which holds the settings and the password, then:",
            f"  sudo systemctl link {' '.join(str(path) for path in units)}",
            f"  sudo systemctl enable --now {names}",
            "  tuneline status",
        ]
    )


def _unit(name: ServiceName, pool: str, environment: Path, *, with_servers: bool) -> str:
    words = {"prefect": "the Prefect server", "mlflow": "the MLflow server", "worker": f"a worker of the pool {pool}"}
    command = [sys.executable, "-m", "flows.cli", "serve", name, *(["--pool", pool] if pool else [])]
    after = " tuneline-prefect.service tuneline-mlflow.service" if name == "worker" and with_servers else ""
    return _UNIT.format(
        description=words[name],
        after=after,
        user=getpass.getuser(),
        environment=str(environment).replace("%", "%%"),
        command=" ".join(_quoted(part) for part in command),
        killing=_KILL_WORKER if name == "worker" else _KILL_SERVER,
    )


def _environment(settings: Settings) -> str:
    """Every setting that is given now, with the home and, for a joined host, where the servers are."""
    given = {name: value for name, value in os.environ.items() if name.startswith("TUNELINE_") or name in _JOINED}
    lines = [
        f"{name}={_value(value)}" for name, value in sorted({**given, "TUNELINE_HOME": str(settings.root)}.items())
    ]
    return "\n".join(["# Settings of Tuneline. Holds secrets: keep it readable by its owner only.", *lines, ""])


def _quoted(part: str) -> str:
    """One word of ExecStart: `%` begins a specifier, `$` a variable."""
    escaped = part.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _value(value: str) -> str:
    """One value of an environment file: in double quotes a backslash takes these four as they are."""
    for character in ("\\", '"', "$", "`"):
        value = value.replace(character, f"\\{character}")
    return f'"{value}"'

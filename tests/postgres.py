"""PostgreSQL for the tests: `python -m tests.postgres [PYTEST ARGUMENTS]`, or `make test-postgres`.

Installs Debian's package if there is none, makes a cluster of its own in a temporary folder, as a user without rights,
on a free port and with a password, and runs the tests with a database of its own behind each server of each home:
what would ask for a database asks `own_databases`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ADDRESS_VARIABLE = "TUNELINE_TEST_POSTGRES"
_USER = "tuneline"
_EVERYTHING = ["tests/deployments", "tests/flows/test_lifecycle_paths.py", "tests/flows/test_resume.py"]


def own_databases() -> dict[str, str]:
    """The settings of a home of its own: two fresh databases; none if the tests do not run on PostgreSQL."""
    server = os.environ.get(ADDRESS_VARIABLE)
    if server is None:
        return {}
    import psycopg2

    draw = secrets.token_hex(6)
    connection = psycopg2.connect(f"{server}/postgres")
    try:
        connection.autocommit = True  # a database is not made within a transaction
        with connection.cursor() as cursor:
            for kind in ("prefect", "mlflow"):
                cursor.execute(f"CREATE DATABASE {kind}_{draw}")
    finally:
        connection.close()
    return {f"TUNELINE_{kind.upper()}_DATABASE": f"{server}/{kind}_{draw}" for kind in ("prefect", "mlflow")}


def main(arguments: Sequence[str]) -> int:
    """Run pytest on PostgreSQL; its exit code."""
    # A time limit's SIGTERM would otherwise leave the cluster behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with cluster(_programs()) as address:
        chosen = list(arguments) or ["-m", "not slow and not operations and not methods and not targets", *_EVERYTHING]
        environment = {**os.environ, ADDRESS_VARIABLE: address}
        return subprocess.run([sys.executable, "-m", "pytest", *chosen], env=environment, check=False).returncode


def _programs() -> Path:
    """The folder of initdb and pg_ctl, after installing them if need be."""
    found = _installed()
    if found is None:
        _install()
        found = _installed()
    if found is None:
        sys.exit("apt-get has installed postgresql, but initdb is not to be found below /usr/lib/postgresql")
    return found


def _installed() -> Path | None:
    if initdb := shutil.which("initdb"):
        return Path(initdb).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def _install() -> None:
    how = "install PostgreSQL (initdb and pg_ctl in the PATH), then run this again"
    if shutil.which("apt-get") is None:
        sys.exit(f"there is neither PostgreSQL nor apt-get on this machine: {how}")
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if root and shutil.which("sudo") is None:
        sys.exit(f"PostgreSQL is missing, and there is no right to install it: {how}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]):
        if subprocess.run([*root, *command], env=environment, check=False).returncode != 0:
            sys.exit(f"`{' '.join(command)}` failed: {how}")


@contextmanager
def cluster(programs: Path) -> Iterator[str]:
    """A running cluster that is gone afterwards; gives `postgresql://USER:PASSWORD@HOST:PORT`."""
    folder = Path(tempfile.mkdtemp(prefix="tuneline-postgres-"))
    password = secrets.token_urlsafe(12)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = folder / "password"
    secret.write_text(password, encoding="utf-8")
    data, log = folder / "data", folder / "log"
    as_user = _hand_over(folder)
    # Nothing here has to survive a power cut: without waiting for the disk it is several times as fast.
    options = f"-p {port} -h 127.0.0.1 -k '' -c max_connections=300 -c fsync=off -c synchronous_commit=off"
    make = [str(programs / "initdb"), "-D", str(data), "-U", _USER, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"]
    control = [*as_user, str(programs / "pg_ctl"), "-D", str(data), "-w"]
    try:
        _run([*as_user, *make, "--locale=C.UTF-8", f"--pwfile={secret}"])
        _run([*control, "-l", str(log), "-o", options, "start"])
        try:
            yield f"postgresql://{_USER}:{password}@127.0.0.1:{port}"
        finally:
            _run([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder)


def _hand_over(folder: Path) -> list[str]:
    """How to run a command as somebody else than root, which PostgreSQL refuses; the folder is theirs then."""
    if os.geteuid() != 0:
        return []
    shutil.chown(folder, "postgres")
    for path in folder.iterdir():
        shutil.chown(path, "postgres")
    return ["runuser", "-u", "postgres", "--"]


def _run(command: list[str]) -> None:
    """Run to its end; its output goes to files, because a server that it starts would keep a pipe open."""
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", check=False)
        if done.returncode != 0:
            output.seek(0)
            sys.exit(f"`{command[-1]}` of PostgreSQL failed:\n{output.read()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

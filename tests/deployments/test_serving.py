"""Services in the foreground and the systemd units that run them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from configs.errors import UserError
from configs.settings import Settings
from deployments import services, systemd
from deployments.service_records import read_record
from tests.deployments.test_services import free_port, processes_of
from tests.postgres import own_databases

PASSWORD = 'a"b$c`d\\e%f and more'


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_")) and name != "TUNELINE_TEST_POSTGRES":
            monkeypatch.delenv(name)
    for name, value in own_databases().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "a 100% home"))
    monkeypatch.setenv("TUNELINE_PREFECT_PORT", str(free_port()))
    monkeypatch.setenv("TUNELINE_MLFLOW_PORT", str(free_port()))
    monkeypatch.setenv("TUNELINE_USER", "operator")
    monkeypatch.setenv("TUNELINE_PASSWORD", PASSWORD)
    return Settings()


def unit_lines(path: Path, name: str) -> list[str]:
    return [line.partition("=")[2] for line in path.read_text().splitlines() if line.startswith(f"{name}=")]


def exec_start(path: Path) -> list[str]:
    """The words of ExecStart as systemd reads them."""
    (line,) = unit_lines(path, "ExecStart")
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


def variables(path: Path) -> dict[str, str]:
    """An environment file as systemd reads it: in double quotes a backslash takes these four as they are."""
    found = {}
    for line in path.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            for character in ('"', "$", "`", "\\"):
                value = value.replace(f"\\{character}", f"\0{ord(character)}\0")
            value = value.strip('"')
            for character in ('"', "$", "`", "\\"):
                value = value.replace(f"\0{ord(character)}\0", character)
            found[name] = value
    return found


def test_units_hold_no_secret_and_the_environment_file_is_private_and_kept(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "units"
    written = systemd.write_units(settings, folder, None)
    assert [path.name for path in written] == [
        "tuneline.env",
        "tuneline-prefect.service",
        "tuneline-mlflow.service",
        "tuneline-worker-tuneline.service",
    ]
    environment, *units = written
    assert environment.stat().st_mode & 0o777 == 0o600
    assert variables(environment)["TUNELINE_PASSWORD"] == PASSWORD
    assert variables(environment)["TUNELINE_HOME"] == str(settings.root)
    for unit in units:
        assert PASSWORD not in unit.read_text()
        assert unit_lines(unit, "EnvironmentFile") == [str(environment)]
    assert [unit_lines(unit, "KillMode") for unit in units] == [["mixed"], ["mixed"], ["process"]]
    environment.write_text("# an operator's own\n")
    assert environment not in systemd.write_units(settings, folder, None)
    assert environment.read_text() == "# an operator's own\n"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd to ask")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, settings: Settings) -> None:
    units = [*systemd.write_units(settings, tmp_path / "units", None)[1:]]
    units += systemd.write_units(settings, tmp_path / "joined", "gpu-a100")[1:]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True, check=False
    )
    own = [line for line in done.stderr.splitlines() if "tuneline" in line]
    assert (done.returncode, own) == (0, [])


def test_units_of_servers_open_to_the_network_need_credentials(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a password"):
        systemd.write_units(Settings(home=tmp_path, host="0.0.0.0"), tmp_path / "units", None)  # noqa: S104
    assert not (tmp_path / "units").exists()


@pytest.fixture
def supervised(tmp_path: Path, settings: Settings) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ExecStart of each unit, run at once as after a reboot, with the environment file and nothing else."""
    environment, *units = systemd.write_units(settings, tmp_path / "units", None)
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables(environment)}
    with (tmp_path / "journal").open("wb") as journal:
        running = [
            subprocess.Popen(
                exec_start(unit), env=bare, cwd="/", stdout=journal, stderr=journal, start_new_session=True
            )
            for unit in units
        ]
    try:
        yield running
    finally:
        for process in running:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
        for left in processes_of(settings):
            left.kill()


def wait_for(condition: Callable[[], object], journal: Path, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, journal.read_text()
        time.sleep(0.5)


@pytest.mark.operations
def test_units_run_all_three_healthy_and_down_leaves_them_to_systemd(
    tmp_path: Path, settings: Settings, supervised: list[subprocess.Popen[bytes]]
) -> None:
    wait_for(lambda: [told.state for told in services.status(settings)] == ["running"] * 3, tmp_path / "journal")
    assert [told.pid for told in services.status(settings)] == [process.pid for process in supervised]
    found = services.addresses(settings)
    with httpx.Client(trust_env=False) as client:
        for auth, status in ((None, 401), (("operator", PASSWORD), 200)):
            asked = client.post(f"{found.prefect_api}/flow_runs/filter", json={}, auth=auth)
            search = f"{found.mlflow}/api/2.0/mlflow/experiments/search"
            assert [asked.status_code, client.post(search, json={"max_results": 1}, auth=auth).status_code] == [
                status
            ] * 2
    for process in processes_of(settings):
        assert PASSWORD not in " ".join(process.cmdline())
    assert PASSWORD not in (tmp_path / "journal").read_text()

    assert [told.state for told in services.up(settings)] == ["already running"] * 3
    assert [told.state for told in services.down(settings)] == ["left to its supervisor"] * 3
    assert [process.poll() for process in supervised] == [None] * 3

    # What systemd does at `restart`: SIGTERM to the leader, and ExecStart again.
    worker = supervised[2]
    command, environment = psutil.Process(worker.pid).cmdline(), psutil.Process(worker.pid).environ()
    worker.terminate()
    worker.wait(30)
    assert services.status(settings)[2].state == "not running"
    assert "--pool" in command
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    for process in supervised[:2]:
        process.terminate()
        process.wait(30)
    assert processes_of(settings) == []
    record = read_record(settings, "worker", "tuneline")
    assert record is not None
    assert record.supervised

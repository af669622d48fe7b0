"""The servers, on real processes and free ports, in a home folder whose name holds a space."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.errors import UserError
from configs.services import ServiceRecord
from configs.settings import PROJECT_ROOT, Settings
from deployments import databases, services
from deployments.processes import TOKEN_VARIABLE, is_alive
from tasks.processes import process_start
from tests.postgres import ADDRESS_VARIABLE, own_databases

LOAD = """
import json, sys
from configs.settings import load_settings
from deployments import databases, services
settings = load_settings()
"""
CONNECT = LOAD + "services.connect(settings)\n"

ASK_AFTER_UP = """
services.up(settings)
services.connect(settings)
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(json.dumps(str(client.api_url)))
"""

LOG_A_RUN = """
from mlflow import MlflowClient
client = MlflowClient()
found = client.get_experiment_by_name(sys.argv[1])
experiment = found.experiment_id if found else client.create_experiment(
    sys.argv[1], artifact_location=databases.mlflow_artifact_location(settings))
run = client.create_run(experiment).info.run_id
client.log_metric(run, "loss", 0.5)
client.log_text(run, "what was said", "notes/said.txt")
client.set_terminated(run)
print(json.dumps({"run": run, "tracking": client.tracking_uri}))
"""

READ_A_RUN = """
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient()
run = client.get_run(sys.argv[1])
path = client.download_artifacts(sys.argv[1], "notes/said.txt")
text = Path(path).read_text()
print(json.dumps({"loss": run.data.metrics["loss"], "text": text, "tracking": client.tracking_uri}))
"""

RUN_A_FLOW = """
from prefect import flow
@flow(name="embedded-flow")
def embedded(): return 1
state = embedded(return_state=True)
print(json.dumps({"run": str(state.state_details.flow_run_id)}))
"""

SLOW_FLOW = """
import os, subprocess, sys, time
from pathlib import Path
from prefect import flow

@flow
def slow(note: str):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(note).write_text(f"{os.getpid()} {child.pid} {os.environ['MLFLOW_TRACKING_URI']}")
    child.wait()
    time.sleep(600)  # ended as its child is, never completed
"""

DEPLOY_AND_RUN = """
from prefect import flow
from prefect.deployments import run_deployment
slow = flow.from_source(source=sys.argv[1], entrypoint="slow.py:slow")
slow.deploy(name="slow", work_pool_name=services.WORK_POOL, print_next_steps=False)
run = run_deployment("slow/slow", parameters={"note": sys.argv[2]}, timeout=0, as_subflow=False)
print(json.dumps({"run": str(run.id)}))
"""

READ_A_FLOW_RUN = """
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(json.dumps({"state": client.read_flow_run(sys.argv[1]).state.type.value}))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_python(settings: Settings, code: str, *arguments: str, before: str = CONNECT) -> Any:
    """Run code in a fresh process of this installation; its last line of output, parsed."""
    hidden = ("PREFECT_", "MLFLOW_", "TUNELINE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {
        "TUNELINE_HOME": str(settings.root),
        "TUNELINE_PREFECT_PORT": str(settings.prefect_port),
        "TUNELINE_MLFLOW_PORT": str(settings.mlflow_port),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    for name, address in {"PREFECT": settings.prefect_database, "MLFLOW": settings.mlflow_database}.items():
        if address is not None:
            environment[f"TUNELINE_{name}_DATABASE"] = address.get_secret_value()
    done = subprocess.run(
        [sys.executable, "-c", before + code, *arguments],
        env=environment,
        cwd=settings.root,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


def processes_of(settings: Settings) -> list[psutil.Process]:
    """Every process that carries the token of a service and this home folder."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if TOKEN_VARIABLE in environment and environment.get("TUNELINE_HOME") == str(settings.root):
            found.append(process)
    return found


@pytest.fixture(autouse=True, scope="module")
def _own_environment() -> Iterator[None]:
    """Keep the settings of whoever runs the tests from the servers, and ours from the tests after these."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(saved)


class Installation:
    """A home folder with an embedded past, whose servers are up."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.flow_run: str = run_python(settings, RUN_A_FLOW)["run"]
        self.embedded = run_python(settings, LOG_A_RUN, "trains")
        self.first = services.up(settings)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    home = tmp_path_factory.mktemp("a home")
    for name, value in own_databases().items():
        os.environ[name] = value  # taken back with all others by `_own_environment`
    settings = Settings(home=home, prefect_port=free_port(), mlflow_port=free_port(), grace_seconds=5)
    try:
        yield Installation(settings)
    finally:
        services.down(settings)


def test_up_starts_all_three_and_a_second_time_leaves_them_alone(installation: Installation) -> None:
    settings = installation.settings
    assert [told.state for told in installation.first] == ["started"] * 3
    again = services.up(settings)
    assert [told.state for told in again] == ["already running"] * 3
    assert [told.pid for told in again] == [told.pid for told in installation.first]
    assert [told.state for told in services.status(settings)] == ["running"] * 3
    for address in services.addresses(settings).model_dump().values():
        assert address in services.what_to_click(settings) or address.endswith("/api")


def test_the_prefect_page_asks_the_server_it_came_from(installation: Installation) -> None:
    found = services.addresses(installation.settings)
    told = httpx.get(f"{found.prefect_ui}/ui-settings").json()
    assert told["api_url"] == found.prefect_api


def test_a_worker_waits_in_the_work_pool(installation: Installation) -> None:
    api = services.addresses(installation.settings).prefect_api
    pool = httpx.get(f"{api}/work_pools/{services.WORK_POOL}").json()
    assert (pool["type"], pool["status"]) == ("process", "READY")


def test_a_flow_run_from_before_up_is_on_the_server(installation: Installation) -> None:
    api = services.addresses(installation.settings).prefect_api
    run = httpx.get(f"{api}/flow_runs/{installation.flow_run}").json()
    assert run["state"]["type"] == "COMPLETED"


def test_the_process_that_called_up_asks_its_server_and_no_embedded_one(installation: Installation) -> None:
    asked = run_python(installation.settings, ASK_AFTER_UP, before=LOAD)
    assert asked.rstrip("/") == services.addresses(installation.settings).prefect_api


def test_an_mlflow_run_from_before_up_is_on_the_server_with_its_artifact(
    installation: Installation,
) -> None:
    address = services.addresses(installation.settings).mlflow
    run_id = installation.embedded["run"]
    assert installation.embedded["tracking"] == databases.mlflow_database_uri(installation.settings)
    page = httpx.get(f"{address}/get-artifact", params={"run_id": run_id, "path": "notes/said.txt"})
    assert page.text == "what was said"
    read = run_python(installation.settings, READ_A_RUN, run_id)
    assert read == {"loss": 0.5, "text": "what was said", "tracking": address}


def test_connect_leaves_an_address_alone_that_somebody_else_has_set(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team.example:5000")
    monkeypatch.setenv("PREFECT_API_URL", "unset below, so that monkeypatch restores it")
    monkeypatch.delenv("PREFECT_API_URL")
    found = services.connect(installation.settings)
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://team.example:5000"
    assert os.environ["PREFECT_API_URL"] == found.prefect_api


def test_up_starts_again_only_what_has_died(installation: Installation) -> None:
    settings = installation.settings
    mlflow = services.status(settings)[1]
    assert mlflow.pid is not None
    children = psutil.Process(mlflow.pid).children(recursive=True)
    os.kill(mlflow.pid, signal.SIGKILL)
    os.waitpid(mlflow.pid, 0)
    assert services.status(settings)[1].state == "not running"
    states = [told.state for told in services.up(settings)]
    assert states == ["already running", "started", "already running"]
    # The killed leader's workers still held the port; `up` has ended them rather than call them a stranger's.
    assert children
    assert not [child for child in children if child.is_running()]


def test_down_ends_every_process_and_what_the_servers_recorded_stays_readable(
    installation: Installation, tmp_path: Path
) -> None:
    settings = installation.settings
    logged = run_python(settings, LOG_A_RUN, "trains")
    assert logged["tracking"] == services.addresses(settings).mlflow
    (tmp_path / "slow.py").write_text(SLOW_FLOW)
    note = tmp_path / "note"
    flow_run = run_python(settings, DEPLOY_AND_RUN, str(tmp_path), str(note))["run"]
    deadline = time.monotonic() + 60
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline, (settings.services / "worker-tuneline.log").read_text()
        time.sleep(0.2)
    engine, child, tracking = note.read_text().split()
    assert tracking == logged["tracking"]
    assert len(processes_of(settings)) >= 6

    assert [told.state for told in services.down(settings)] == ["stopped"] * 3

    assert processes_of(settings) == []
    assert not psutil.pid_exists(int(engine))
    assert not psutil.pid_exists(int(child))
    assert [told.state for told in services.down(settings)] == ["not running"] * 3
    assert services.what_to_click(settings).startswith("No server is running")
    # The flow run could still tell the server its end: it does not stay "running" for ever.
    assert run_python(settings, READ_A_FLOW_RUN, flow_run)["state"] in {"CRASHED", "CANCELLED"}
    read = run_python(settings, READ_A_RUN, logged["run"])
    assert read["text"] == "what was said"
    assert read["tracking"] == databases.mlflow_database_uri(settings)


# --- without servers ---------------------------------------------------------------------------------------


def record_of(settings: Settings, process: subprocess.Popen[bytes], **changes: object) -> ServiceRecord:
    record = ServiceRecord(
        name="mlflow",
        pid=process.pid,
        process_start=process_start(psutil.Process(process.pid)),
        token="of-the-test",
        started_at=datetime.now(UTC),
        command=["mlflow"],
        address="http://127.0.0.1:9",
        given={},
        log=settings.services / "mlflow.log",
        ready=True,
    ).model_copy(update=changes)
    settings.services.mkdir(parents=True, exist_ok=True)
    (settings.services / "mlflow.json").write_text(record.model_dump_json())
    return record


def start_process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)


def test_a_stranger_that_got_the_recorded_pid_is_not_ended(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    stranger = start_process("import time; time.sleep(600)")
    try:
        start = process_start(psutil.Process(stranger.pid))
        record = record_of(settings, stranger, process_start=start - 100)
        assert not is_alive(record)
        assert services.addresses(settings).mlflow is None
        assert [told.state for told in services.down(settings)] == ["not running"] * 3
        assert stranger.poll() is None
        assert not (settings.services / "mlflow.json").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_service_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "STOP_SECONDS", 1.0)
    settings = Settings(home=tmp_path)
    deaf = start_process(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True); time.sleep(600)"
    )
    assert deaf.stdout is not None
    deaf.stdout.readline()
    record_of(settings, deaf)
    assert services.down(settings)[1].state == "stopped"
    assert not psutil.pid_exists(deaf.pid)


def test_a_taken_port_is_refused_by_number_holder_and_setting(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        settings = Settings(home=tmp_path, prefect_port=free_port(), mlflow_port=port)
        with pytest.raises(UserError) as caught:
            services.up(settings)
    message = str(caught.value)
    assert f"port {port}" in message
    assert f"pid {os.getpid()}" in message
    assert "TUNELINE_MLFLOW_PORT" in message
    # Nothing is left half up: the Prefect server, whose port was free, was not started.
    assert not (settings.services / "prefect.json").exists()


@pytest.mark.skipif(ADDRESS_VARIABLE in os.environ, reason="there is no database file to damage")
def test_what_up_had_started_is_ended_when_a_server_fails(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, prefect_port=free_port(), mlflow_port=free_port())
    settings.mlflow_sqlite.parent.mkdir(parents=True)
    settings.mlflow_sqlite.write_bytes(b"this is not a database" * 100)
    with pytest.raises(UserError, match="mlflow service ended while starting") as caught:
        services.up(settings)
    assert "file is not a database" in str(caught.value)
    assert processes_of(settings) == []
    assert [told.state for told in services.status(settings)] == ["not running"] * 3


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "gpu-host.lan"])  # noqa: S104
def test_a_host_open_to_the_network_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="TUNELINE_HOST"):
        services.up(Settings(home=tmp_path, host=host))
    assert not (tmp_path / "services").exists()


def test_one_port_for_both_servers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot share one port"):
        services.up(Settings(home=tmp_path, prefect_port=4800, mlflow_port=4800))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.services.mkdir()
    (settings.services / "prefect.json").write_text("{}")
    with pytest.raises(UserError, match=r"prefect\.json"):
        services.status(settings)


def test_connect_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = "print(json.dumps([name for name in ('prefect', 'mlflow', 'torch') if name in sys.modules]))"
    assert run_python(Settings(home=tmp_path), heavy) == []

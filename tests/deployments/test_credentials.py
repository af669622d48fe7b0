"""Servers that others can reach: refused without credentials, closed without them, and the password nowhere."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest
from pydantic import SecretStr

from configs.errors import UserError
from configs.settings import Settings
from deployments import credentials, services
from deployments.ports import public_host, server_address
from tests.deployments.test_services import free_port, processes_of
from tests.postgres import own_databases
from tests.tiny_models import make_tiny_chat_model

USER, PASSWORD = "operator", "p%ss/word: 'with' $igns \\ and \""
POOL = "gpu-a100"


@pytest.fixture(autouse=True)
def _no_servers_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_")):
            monkeypatch.delenv(name)


def given(home: Path, **changes: object) -> Settings:
    values = {"home": home, "user": USER, "password": PASSWORD, "grace_seconds": 20, **changes}
    return Settings(**values)  # type: ignore[arg-type]


# --- without servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"user": None, "password": None}, "TUNELINE_HOST", "TUNELINE_USER and TUNELINE_PASSWORD"),
        ({"user": None}, "TUNELINE_USER", "needed together"),
        ({"password": None}, "TUNELINE_PASSWORD", "needed together"),
        ({"password": ""}, "TUNELINE_PASSWORD", "needed together"),
        ({"password": "elevenchars"}, "TUNELINE_PASSWORD", "secrets.token_urlsafe"),
        ({"password": "zwölf Zeichen"}, "TUNELINE_PASSWORD", "ASCII"),
        ({"user": "a:b"}, "TUNELINE_USER", "colon"),
    ],
)
def test_impossible_credentials_are_refused_and_never_shown(
    tmp_path: Path, changes: dict[str, object], field: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        services.up(given(tmp_path, host="0.0.0.0", **changes))  # noqa: S104
    assert caught.value.field == field
    assert told in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert "elevenchars" not in str(caught.value)
    assert not (tmp_path / "services").exists()


def test_kept_credentials_are_private_and_the_environment_goes_before_them(tmp_path: Path) -> None:
    first = credentials.find_credentials(given(tmp_path))
    assert first is not None
    credentials.keep_credentials(given(tmp_path), first)
    assert credentials.credentials_file(given(tmp_path)).stat().st_mode & 0o777 == 0o600
    assert credentials.find_credentials(Settings(home=tmp_path)) == first
    other = credentials.find_credentials(given(tmp_path, password="another password"))
    assert other is not None
    assert not other.same_as(first)
    assert other.mlflow_key == first.mlflow_key
    assert PASSWORD not in repr(first)


@pytest.mark.parametrize(
    ("variables", "field", "told"),
    [
        ({}, "PREFECT_API_URL", "none run on this host"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "MLFLOW_TRACKING_URI", "none run on this host"),
        (
            {"PREFECT_API_URL": "http://u:secret@127.0.0.1:9/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
            "PREFECT_API_URL",
            "TUNELINE_USER",
        ),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "MLFLOW_TRACKING_URI": "sqlite:///x"},
            "MLFLOW_TRACKING_URI",
            "no address of a server",
        ),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
            "PREFECT_API_URL",
            "nobody answers",
        ),
    ],
)
def test_joining_names_the_address_that_is_missing_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], field: str, told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told) as caught:
        services.join(given(tmp_path), POOL)
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


def test_a_pool_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no name of a work pool"):
        services.join(given(tmp_path), "../gpu")


# --- open to the network -----------------------------------------------------------------------------------


class Open:
    """An installation whose servers listen on every address, and the folders of what it trains on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = given(
            root / "home",
            host="0.0.0.0",  # noqa: S104
            prefect_port=free_port(),
            mlflow_port=free_port(),
        )
        self.prefect = server_address(self.settings, "prefect")
        self.mlflow = server_address(self.settings, "mlflow")
        self.http = httpx.Client(trust_env=False, timeout=30, auth=(USER, PASSWORD.encode()))

    def statuses(self, **options: object) -> list[int]:
        with httpx.Client(trust_env=False, timeout=30, **options) as client:  # type: ignore[arg-type]
            asked = [
                client.post(f"{self.prefect}/api/flow_runs/filter", json={}),
                client.post(f"{self.mlflow}/api/2.0/mlflow/experiments/search", json={"max_results": 1}),
                client.get(f"{self.mlflow}/"),
            ]
        return [answer.status_code for answer in asked]

    def run(self, title: str, parameters: dict[str, object]) -> str:
        found = self.http.get(f"{self.prefect}/api/deployments/name/{title}").raise_for_status().json()
        start = f"{self.prefect}/api/deployments/{found['id']}/create_flow_run"
        run = self.http.post(start, json={"parameters": parameters}).raise_for_status().json()["id"]
        wait_for(lambda: self.state(run) in ("Completed", "Failed", "Crashed"))
        return str(run)

    def state(self, run: str) -> str:
        return str(self.http.get(f"{self.prefect}/api/flow_runs/{run}").json()["state"]["name"])


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    saved = dict(os.environ)
    os.environ |= own_databases()
    place = Open(tmp_path_factory.mktemp("open"))
    make_tiny_chat_model(place.root / "tiny", seed=1)
    rows = [{"prompt": f"switch the light {number}", "completion": f"on {number % 7}"} for number in range(24)]
    (place.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = "1"
    # As the operator gives them: what `up` starts inherits its environment, and must not pass these on.
    os.environ |= {"TUNELINE_USER": USER, "TUNELINE_PASSWORD": PASSWORD, "TUNELINE_HOST": "0.0.0.0"}  # noqa: S104
    try:
        assert [told.state for told in services.up(place.settings)] == ["started"] * 3
        yield place
    finally:
        services.down(place.settings)
        assert processes_of(place.settings) == []
        os.environ.clear()
        os.environ.update(saved)


def forms_of(secret: str) -> set[bytes]:
    """How a password could stand somewhere: as it is, in JSON, in an address, in a header."""
    pair = base64.b64encode(f"{USER}:{secret}".encode())
    return {secret.encode(), json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode(), pair}


def files_holding(folder: Path, secrets: set[bytes]) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    ]


@pytest.mark.operations
def test_servers_answer_nobody_without_the_password_and_only_to_their_names(opened: Open) -> None:
    assert opened.statuses() == [401, 401, 401]
    assert opened.statuses(auth=(USER, b"wrong password")) == [401, 401, 401]
    assert opened.statuses(auth=(USER, PASSWORD.encode())) == [200, 200, 200]
    stranger = opened.http.get(f"{opened.mlflow}/", headers={"Host": "evil.example"})
    assert stranger.status_code == 403
    own = {"Origin": opened.mlflow}
    page = opened.http.post(
        f"{opened.mlflow}/ajax-api/2.0/mlflow/experiments/search", json={"max_results": 1}, headers=own
    )
    assert page.status_code == 200
    settings = opened.http.get(f"{opened.prefect}/ui-settings").json()
    assert settings["api_url"] == f"http://{public_host(opened.settings)}:{opened.settings.prefect_port}/api"


@pytest.mark.operations
def test_up_again_needs_no_password_in_the_environment_and_refuses_another(opened: Open) -> None:
    without = opened.settings.model_copy(update={"user": None, "password": None})
    assert [told.state for told in services.up(without)] == ["already running"] * 3
    assert [told.state for told in services.status(without)] == ["running"] * 3
    other = opened.settings.model_copy(update={"password": SecretStr("another password")})
    with pytest.raises(UserError, match="started with other credentials"):
        services.up(other)


@pytest.mark.operations
def test_a_train_runs_and_the_password_is_nowhere(opened: Open) -> None:
    train = {
        "name": "lights",
        "base_model": str(opened.root / "tiny"),
        "dataset": str(opened.root / "rows.jsonl"),
        "method": "sft",
        "hyperparameters": {"max_steps": 4, "batch_size": 4, "max_seq_length": 128},
    }
    run = opened.run("customized/sft", {"train": train})
    assert opened.state(run) == "Completed"
    (record,) = opened.settings.trains.glob("lights_*/train.json")
    mlflow_run = json.loads(record.read_text())["run_id"]
    asked = opened.http.get(f"{opened.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": mlflow_run}).json()["run"]
    assert asked["info"]["status"] == "FINISHED"
    assert asked["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    yaml = {"run_id": mlflow_run, "path": "config/train.yaml"}
    assert "lights" in opened.http.get(f"{opened.mlflow}/get-artifact", params=yaml).text

    secrets = forms_of(PASSWORD)
    assert files_holding(opened.settings.root, secrets) == [credentials.credentials_file(opened.settings)]
    for kind in ("flow_runs", "deployments", "logs", "artifacts"):
        told = opened.http.post(f"{opened.prefect}/api/{kind}/filter", json={}).raise_for_status().content
        assert not [secret for secret in secrets if secret in told], kind
    lines = ["\0".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if PASSWORD in line]


@pytest.mark.operations
def test_a_host_joins_with_a_pool_of_its_own_and_leaves_again(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{opened.prefect}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", opened.mlflow)
    monkeypatch.delenv("TUNELINE_HOST", raising=False)
    with pytest.raises(UserError, match="refuses the credentials"):
        services.join(given(tmp_path, password="not that password"), POOL)
    settings = given(tmp_path)
    try:
        (joined,) = services.join(settings, POOL)
        assert (joined.name, joined.pool, joined.state) == ("worker", POOL, "started")
        (again,) = services.join(settings, POOL)
        assert (again.state, again.pid) == ("already running", joined.pid)
        assert [(told.name, told.pool, told.state) for told in services.status(settings)] == [
            ("prefect", None, "not running"),
            ("mlflow", None, "not running"),
            ("worker", POOL, "running"),
        ]
        assert services.addresses(settings).mlflow == opened.mlflow
        workers = opened.http.post(f"{opened.prefect}/api/work_pools/{POOL}/workers/filter", json={}).json()
        assert [worker["name"] for worker in workers] == [socket.gethostname()]
        assert joined.pid is not None
        environment = psutil.Process(joined.pid).environ()
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert not {name for name in environment if name in credentials.OWN_VARIABLES}

        run = opened.run(f"add-dataset/file@{POOL}", {"file": str(opened.root / "rows.jsonl"), "name": "joined"})
        assert opened.state(run) == "Completed"
        assert list((settings.datasets / "joined").glob("*/rows.jsonl"))
        assert not (opened.settings.datasets / "joined").exists()
        assert files_holding(tmp_path, forms_of(PASSWORD)) == [credentials.credentials_file(settings)]
    finally:
        told = services.down(settings)
    assert [(item.name, item.state) for item in told] == [
        ("prefect", "not running"),
        ("mlflow", "not running"),
        ("worker", "stopped"),
    ]
    assert processes_of(settings) == []
    assert [item.state for item in services.status(opened.settings)] == ["running"] * 3


@pytest.mark.operations
def test_a_new_password_takes_the_place_of_the_old_one_on_both_servers(opened: Open) -> None:
    new = opened.settings.model_copy(update={"user": "somebody", "password": SecretStr("a new password")})
    services.down(opened.settings)
    try:
        assert [told.state for told in services.up(new)] == ["started"] * 3
        assert opened.statuses(auth=("somebody", b"a new password")) == [200, 200, 200]
        assert opened.statuses(auth=(USER, PASSWORD.encode())) == [401, 401, 401]
    finally:
        services.down(new)

"""Addresses of databases, and where MLflow keeps the files of its runs."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from pydantic import SecretStr

from configs.errors import UserError
from configs.settings import Settings
from deployments import databases
from deployments.ports import is_open_to_the_network, public_host
from tasks import tracking


@pytest.fixture(autouse=True)
def _no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("address", ["postgresql://u:secret@db:5432/name", "postgres://u:secret@db:5432/name"])
def test_each_server_gets_the_address_with_its_own_driver(tmp_path: Path, address: str) -> None:
    settings = Settings(home=tmp_path, prefect_database=SecretStr(address), mlflow_database=SecretStr(address))
    rest = "u:secret@db:5432/name"
    assert databases.prefect_database_uri(settings) == f"postgresql+asyncpg://{rest}"
    assert databases.mlflow_database_uri(settings) == f"postgresql+psycopg2://{rest}"
    assert databases.mlflow_users_uri(settings) == databases.mlflow_database_uri(settings)


@pytest.mark.parametrize("address", ["mysql://u:secret@db/name", "u:secret@db/name", "postgresql://u:secret@db"])
def test_another_database_is_refused_without_showing_its_password(tmp_path: Path, address: str) -> None:
    settings = Settings(home=tmp_path, prefect_database=SecretStr(address), mlflow_database=SecretStr(address))
    for field, read in (("PREFECT", databases.prefect_database_uri), ("MLFLOW", databases.mlflow_database_uri)):
        with pytest.raises(UserError, match="no address of a PostgreSQL database") as caught:
            read(settings)
        assert caught.value.field == f"TUNELINE_{field}_DATABASE"
        assert "secret" not in str(caught.value)


def test_no_address_means_sqlite_in_the_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, prefect_database=SecretStr(""))
    assert databases.prefect_database_uri(settings) is None
    assert databases.mlflow_database_uri(settings) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert databases.mlflow_users_uri(settings) == f"sqlite:///{tmp_path}/mlflow/users.db"


@pytest.mark.parametrize(
    ("host", "opened"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),  # noqa: S104
        ("192.168.1.7", True),
        ("gpu-host.lan", True),
    ],
)
def test_only_loopback_is_closed(tmp_path: Path, host: str, opened: bool) -> None:
    assert is_open_to_the_network(Settings(home=tmp_path, host=host)) is opened


def test_servers_are_reached_by_the_name_given_else_by_where_they_bind(tmp_path: Path) -> None:
    assert public_host(Settings(home=tmp_path, host="192.168.1.7")) == "192.168.1.7"
    assert public_host(Settings(home=tmp_path, host="0.0.0.0", public_host="gpu.lan")) == "gpu.lan"  # noqa: S104
    assert public_host(Settings(home=tmp_path, host="0.0.0.0")) == os.uname().nodename  # noqa: S104


def test_runs_from_before_and_after_sharing_are_read_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", databases.mlflow_database_uri(settings))
    settings.mlflow_sqlite.parent.mkdir()
    before = tracking.start_run("before", "train", {})
    tracking.mlflow_client().log_text(before, "first", "note.txt")

    databases.share_artifacts(settings)  # on loopback for this host alone: nothing to do
    assert _location(settings).startswith("file:")
    databases.share_artifacts(Settings(home=tmp_path, public_host="gpu.lan"))
    assert _location(settings) == "mlflow-artifacts:/"

    after = tracking.start_run("after", "train", {})
    tracking.mlflow_client().log_text(after, "second", "note.txt")
    for run, text in ((before, "first"), (after, "second")):
        assert (settings.mlflow_artifacts / run / "artifacts" / "note.txt").read_text() == text
        path = tracking.mlflow_client().download_artifacts(run, "note.txt")
        assert Path(path).read_text() == text


def _location(settings: Settings) -> str:
    with sqlite3.connect(settings.mlflow_sqlite) as connection:
        (row,) = connection.execute("SELECT artifact_location FROM experiments WHERE name = 'tuneline'")
    connection.close()
    return str(row[0])


def test_a_server_of_somebody_else_chooses_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    assert databases.mlflow_artifact_location(settings) == settings.mlflow_artifacts.as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://gpu-server.lan:5000")
    assert databases.mlflow_artifact_location(settings) is None

"""Curves reach MLflow once each, through a real server that goes away and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs.settings import PROJECT_ROOT, Settings, load_settings
from deployments.databases import mlflow_database_uri
from methods import contract
from tasks import tracking
from tasks.tracking import CurveForwarder
from tests.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.end()


@pytest.fixture
def settings(home: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return load_settings()


@pytest.fixture
def run_id(settings: Settings) -> str:
    return tracking.start_run("a train", "train", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def write_steps(folder: Path, first: int, last: int, *, attempt: int = 1) -> None:
    """Append the metrics of steps as a stage does; a later attempt measures another speed at another time."""
    with (folder / contract.EVENTS_FILE).open("a", encoding="utf-8") as file:
        for step in range(first, last + 1):
            values = {"loss": 1 / step, "tokens_per_second": 100.0 * attempt + step}
            event = {"time": 1_700_000_000.0 * attempt + step, "type": "metrics", "step": step, "values": values}
            file.write(json.dumps(event) + "\n")


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    points = MlflowClient().get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def of_first_attempt(last: int) -> list[tuple[int, float]]:
    return [(step, 100.0 + step) for step in range(1, last + 1)]


def test_each_point_is_sent_once_however_often_one_looks(run_id: str, folder: Path) -> None:
    forwarder = CurveForwarder(run_id, folder)
    write_steps(folder, 1, 5)
    assert forwarder.forward()
    write_steps(folder, 6, 8)
    assert forwarder.forward()
    assert forwarder.forward()
    assert history(run_id, "tokens_per_second") == of_first_attempt(8)
    assert history(run_id, "loss") == [(step, 1 / step) for step in range(1, 9)]


def test_more_points_than_one_request_takes_all_arrive(run_id: str, folder: Path) -> None:
    write_steps(folder, 1, 1100)
    assert CurveForwarder(run_id, folder).forward()
    assert history(run_id, "tokens_per_second") == of_first_attempt(1100)


def test_steps_repeated_by_a_resumed_stage_keep_their_first_values(run_id: str, folder: Path) -> None:
    write_steps(folder, 1, 6)
    assert CurveForwarder(run_id, folder).forward()
    write_steps(folder, 5, 9, attempt=2)
    assert CurveForwarder(run_id, folder).forward()
    first, second = of_first_attempt(6), [(step, 200.0 + step) for step in (7, 8, 9)]
    assert history(run_id, "tokens_per_second") == [*first, *second]


def test_points_sent_but_not_noted_before_the_process_died_are_there_once(run_id: str, folder: Path) -> None:
    forwarder = CurveForwarder(run_id, folder)
    write_steps(folder, 1, 3)
    assert forwarder.forward()
    noted = (folder / "sent.json").read_text()
    write_steps(folder, 4, 7)
    assert forwarder.forward()
    (folder / "sent.json").write_text(noted)  # as if it had died between the sending and the noting
    write_steps(folder, 6, 8, attempt=2)
    assert CurveForwarder(run_id, folder).forward()
    assert history(run_id, "tokens_per_second") == [*of_first_attempt(7), (8, 208.0)]


def test_half_written_last_line_waits_for_its_other_half(run_id: str, folder: Path) -> None:
    write_steps(folder, 1, 2)
    path = folder / contract.EVENTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    forwarder = CurveForwarder(run_id, folder)
    assert forwarder.forward()
    assert history(run_id, "tokens_per_second") == of_first_attempt(1)
    path.write_bytes(content)
    assert forwarder.forward()
    assert history(run_id, "tokens_per_second") == of_first_attempt(2)


def test_loss_that_is_no_number_is_a_point_too(run_id: str, folder: Path) -> None:
    event = {"time": 1.0, "type": "metrics", "step": 1, "values": {"loss": "nan"}}
    (folder / contract.EVENTS_FILE).write_text(json.dumps(event) + "\n")
    assert CurveForwarder(run_id, folder).forward()
    (point,) = MlflowClient().get_metric_history(run_id, "loss")
    assert str(point.value) == "nan"


def test_server_that_is_ended_and_started_again_gets_every_point_once(
    server: MlflowServer, run_id: str, folder: Path
) -> None:
    forwarder = CurveForwarder(run_id, folder, every=0.1, retry=0.2)
    with forwarder.running():
        write_steps(folder, 1, 3)
        while not history(run_id, "loss"):
            time.sleep(0.05)
        server.end()
        write_steps(folder, 4, 6)
        while forwarder.problem is None:
            time.sleep(0.05)
        (away,) = forwarder.news()
        assert "MLflow is away" in away["text"]
        assert forwarder.news() == []
        server.start()
        write_steps(folder, 7, 8)
    assert forwarder.problem is None
    assert [event["text"] for event in forwarder.news()] == ["MLflow answers again"]
    assert history(run_id, "tokens_per_second") == of_first_attempt(8)


def test_server_that_hangs_does_not_hold_up_whoever_watches_the_stage(
    server: MlflowServer, run_id: str, folder: Path
) -> None:
    forwarder = CurveForwarder(run_id, folder, every=0.1)
    server.signal(signal.SIGSTOP)  # takes connections and never answers
    try:
        started = time.monotonic()
        with forwarder.running(last_seconds=1.0):
            write_steps(folder, 1, 4)
            forwarder.news()
        assert time.monotonic() - started < 3
    finally:
        server.signal(signal.SIGCONT)
    assert CurveForwarder(run_id, folder).forward()
    assert history(run_id, "tokens_per_second") == of_first_attempt(4)


def test_run_page_is_the_address_of_the_run_on_the_server(server: MlflowServer, run_id: str) -> None:
    page = tracking.run_page(run_id)
    assert page is not None
    assert page.startswith(f"{server.address}/#/experiments/")
    assert page.endswith(run_id)


def test_parameters_logged_again_stay_as_they_were(run_id: str) -> None:
    tracking.log_parameters(run_id, {"a": 1})
    tracking.log_parameters(run_id, {"a": 2, "b": None})
    assert MlflowClient().get_run(run_id).data.params == {"a": "1", "b": "null"}


@pytest.mark.parametrize(
    ("status", "word"),
    [("completed", "FINISHED"), ("failed", "FAILED"), ("cancelled", "KILLED"), ("interrupted", "KILLED")],
)
def test_run_is_closed_as_the_train_ended_and_can_go_on(run_id: str, status: str, word: str) -> None:
    tracking.end_run(run_id, status)  # type: ignore[arg-type]
    assert MlflowClient().get_run(run_id).info.status == word
    tracking.reopen_run(run_id)
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"


@pytest.mark.lifecycle
def test_processes_that_meet_on_a_new_home_make_its_database_once(home: Path) -> None:
    # Each of the trains that a sweep begins at once is the first to ask MLflow for something.
    code = "from tasks import tracking; print(tracking.start_run('a train', 'train', {}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"TUNELINE_HOME": str(home), "MLFLOW_TRACKING_URI": mlflow_database_uri(load_settings())}
    begun = [
        subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    told = [process.communicate()[0].decode().split() for process in begun]
    assert [process.returncode for process in begun] == [0] * 4
    assert len({run for runs in told for run in runs}) == 4

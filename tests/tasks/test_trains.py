"""The record of a train: who owns it, how it stands, how it ends, whatever MLflow does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import UserError
from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT, load_settings
from configs.train import TrainConfig
from tasks import trains


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def record(home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainRecord]:
    """A train that this process has opened."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    config = TrainConfig(name="lights", description="a | test", base_model="tiny", dataset="rows")
    opened = trains.open_train(config, {"name": "file lights.yaml:1"}, [])
    yield opened
    trains.let_go(opened.id)


@contextmanager
def owned_elsewhere(train_id: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the train while the block runs."""
    program = (
        "import sys, time; from tasks import trains; trains.own_train(sys.argv[1]); print('owned', flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, train_id]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "owned\n"
        yield other
        other.kill()


def run_status(record: TrainRecord) -> str:
    return str(MlflowClient().get_run(record.run_id).info.status)


def test_opened_train_runs_and_is_found_by_id_and_by_name(record: TrainRecord) -> None:
    assert trains.current_status(record) == "running"
    assert trains.load_train(record.id) == record
    assert trains.load_train("lights") == record
    assert run_status(record) == "RUNNING"


def test_unknown_train_is_told_with_those_there_are(record: TrainRecord) -> None:
    with pytest.raises(UserError, match=record.id):
        trains.load_train("no-such-train")


@pytest.mark.parametrize("train_id", ["..", ".", "a/b", "../models", "/etc"])
def test_id_that_leaves_the_store_is_refused(home: Path, train_id: str) -> None:
    with pytest.raises(UserError, match="this is no id of a train"):
        trains.train_folder(train_id)


def test_train_is_running_while_its_process_lives_and_interrupted_when_it_was_killed(record: TrainRecord) -> None:
    trains.let_go(record.id)
    with owned_elsewhere(record.id):
        assert trains.current_status(record) == "running"
    assert trains.current_status(record) == "interrupted"


def test_train_that_another_process_owns_is_not_taken_from_it(record: TrainRecord) -> None:
    trains.let_go(record.id)
    with owned_elsewhere(record.id), pytest.raises(UserError, match="already running"):
        trains.reopen_train(record)
    assert trains.load_train(record.id).attempts == 1


def test_status_of_a_train_that_ended_since_its_record_was_read_is_how_it_ended(record: TrainRecord) -> None:
    trains.close_train(record, "completed")
    assert record.status == "running"
    assert trains.current_status(record) == "completed"


def test_interrupted_train_is_closed_by_the_next_one_and_can_be_reopened(record: TrainRecord) -> None:
    trains.let_go(record.id)
    assert [found.id for found in trains.settle_trains()] == [record.id]
    closed = trains.load_train(record.id)
    assert (closed.status, run_status(record)) == ("interrupted", "KILLED")
    assert closed.ended is not None
    assert trains.settle_trains() == []
    again = trains.reopen_train(closed)
    assert (again.status, again.attempts, again.reason, again.ended) == ("running", 2, None, None)
    assert run_status(record) == "RUNNING"


def test_running_train_is_left_alone_by_the_next_one(record: TrainRecord) -> None:
    assert trains.settle_trains() == []
    trains.let_go(record.id)
    with owned_elsewhere(record.id):
        assert trains.settle_trains() == []
    assert run_status(record) == "RUNNING"


def test_end_that_mlflow_could_not_be_told_is_told_later(
    record: TrainRecord, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    closed = trains.close_train(record, "failed", "out of memory")
    assert (closed.status, closed.reason) == ("failed", "out of memory")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert run_status(record) == "RUNNING"
    trains.settle_trains()
    run = MlflowClient().get_run(record.run_id)
    assert (run.info.status, run.data.tags["tuneline.reason"]) == ("FAILED", "out of memory")


def test_cancelling_a_train_that_does_not_run_is_told(record: TrainRecord) -> None:
    closed = trains.close_train(record, "completed")
    with pytest.raises(UserError, match="this train is not running"):
        trains.cancel_train(closed)
    assert load_settings().trains.joinpath(record.id).is_dir()


def test_a_flow_run_finds_the_train_it_has_worked_on_in_any_attempt(record: TrainRecord) -> None:
    for flow_run in ("first", "second", "second"):
        record = trains.note_flow_run(record, flow_run, None)
    assert (record.flow_run_id, record.earlier_flow_runs) == ("second", ["first"])
    for flow_run in ("first", "second"):
        found = trains.train_of_flow_run(flow_run)
        assert found is not None
        assert found.id == record.id
    assert trains.train_of_flow_run("third") is None


def test_what_auto_became_is_recorded_with_its_origin(record: TrainRecord) -> None:
    event = {"type": "resolved", "name": "dtype", "value": "float32", "origin": "hardware", "reason": "an old CPU"}
    trains.note_resolved(record, [{"type": "phase", "name": "loading"}, event])
    assert trains.load_train(record.id).resolved["dtype"].model_dump() == {
        "value": "float32",
        "origin": "hardware",
        "reason": "an old CPU",
    }
    tags = MlflowClient().get_run(record.run_id).data.tags
    assert tags["tuneline.resolved.dtype"] == "float32 (hardware: an old CPU)"


def test_what_auto_became_is_recorded_while_mlflow_is_away(
    record: TrainRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    event = {"type": "resolved", "name": "dtype", "value": "bfloat16", "origin": "hardware", "reason": "a GPU"}
    trains.note_resolved(record, [event])
    assert trains.load_train(record.id).resolved["dtype"].value == "bfloat16"

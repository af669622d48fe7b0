"""A train asked to stop: its process is told whatever it does, and its record says `cancelled` even if it is killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT
from configs.train import TrainConfig
from tasks import cancelling, trains
from tasks.stages import StageCancelled, raise_if_asked, run_stage
from tests.methods.stage_jobs import small_job, write_stage

RUNS_A_STAGE = """
    import signal, sys
    from pathlib import Path
    from tasks import trains
    from tasks.stages import StageCancelled, run_stage
    from tests.methods.stage_jobs import small_job
    # As on another host of the same home folder, where the signal does not come from.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trains.own_train(sys.argv[1])
    folder = trains.train_folder(sys.argv[1]) / "saving"
    try:
        run_stage(folder, small_job(folder), Path(sys.executable), Path(sys.argv[2]), 20, lambda _: print("runs"))
    except StageCancelled:
        print("cancelled", flush=True)
"""
WAITS = """
    import sys, time
    from tasks import trains
    trains.own_train(sys.argv[1])
    print("runs", flush=True)
    time.sleep(60)
"""
STOPS_FOR_EVER = """
    import sys, time
    from tasks import cancelling, trains
    trains.own_train(sys.argv[1])
    cancelling.note_stopping()
    print("runs", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def record(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainRecord:
    """A train that no process owns yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    opened = trains.open_train(TrainConfig(name="lights", base_model="tiny", dataset="rows"), {}, [])
    trains.let_go(opened.id)
    return opened


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this program that has said that it runs."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(program), *arguments]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        try:
            yield process
        finally:
            process.kill()


def test_any_stage_is_stopped_by_the_request_alone(record: TrainRecord, tmp_path: Path) -> None:
    body = "job.phase('begun')\nwhile not job.cancelled:\n    time.sleep(0.05)\nraise contract.Cancelled\n"
    stage = write_stage(tmp_path / "stage", body)
    with running(RUNS_A_STAGE, record.id, str(stage)) as process:
        trains.cancel_train(record)
        assert process.stdout is not None
        assert process.stdout.read().endswith("cancelled\n")
        assert process.wait(30) == 0


def test_a_flow_between_two_stages_gets_the_signal(record: TrainRecord) -> None:
    with running(WAITS, record.id) as process:
        trains.cancel_train(record)
        assert process.wait(30) == -15


def test_no_stage_begins_once_the_train_was_asked_to_stop(record: TrainRecord, tmp_path: Path) -> None:
    trains.own_train(record.id)
    try:
        raise_if_asked()
        (trains.train_folder(record.id) / "cancel").touch()
        stage = write_stage(tmp_path / "stage", "(job.output / 'ran').touch()")
        with pytest.raises(StageCancelled):
            run_stage(tmp_path / "job", small_job(tmp_path / "job"), Path(sys.executable), stage, 20, lambda _: None)
    finally:
        trains.let_go(record.id)
    assert not (tmp_path / "job").exists()
    raise_if_asked()  # what this process does afterwards is no business of that train


def test_a_train_killed_while_it_was_being_stopped_is_cancelled_not_interrupted(record: TrainRecord) -> None:
    with running(STOPS_FOR_EVER, record.id) as process:
        assert trains.current_status(record) == "running"
        process.kill()
    assert trains.current_status(record) == "cancelled"
    assert [(each.id, each.status) for each in trains.settle_trains()] == [(record.id, "cancelled")]
    trains.reopen_train(trains.load_train(record.id))
    trains.let_go(record.id)
    assert trains.current_status(trains.load_train(record.id)) == "interrupted"  # the request was for that attempt


def test_a_process_of_another_id_holder_is_not_signalled(record: TrainRecord) -> None:
    with running(WAITS, record.id) as process:
        owner = trains.train_folder(record.id) / "owner.json"
        mistaken = cancelling.Owner.model_validate_json(owner.read_bytes()).model_copy(update={"start": 1.0})
        owner.write_text(mistaken.model_dump_json())
        trains.cancel_train(record)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)

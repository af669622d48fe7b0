"""What is decided about a train whose flow run has crashed, and that the reason is recorded either way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT
from configs.train import TrainConfig
from tasks import trains
from tasks.resuming import decide_after_crash
from tasks.tracking import mlflow_client


class Crashes:
    """Opens trains that crash at once."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def train(self, flow_run: str, **fields: Any) -> TrainRecord:
        config = TrainConfig(name="lights", base_model="tiny", dataset="rows", **fields)
        record = trains.note_flow_run(trains.open_train(config, {}, []), flow_run, None)
        self.opened.append(record.id)
        return trains.close_train(record, "interrupted", "killed")

    def again(self, record: TrainRecord, flow_run: str) -> None:
        taken_up = trains.note_flow_run(trains.reopen_train(trains.load_train(record.id)), flow_run, None)
        trains.close_train(taken_up, "interrupted", "killed")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def crashes(home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crashes]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    made = Crashes()
    yield made
    for train_id in made.opened:
        trains.let_go(train_id)


def recorded(record: TrainRecord) -> tuple[str | None, str]:
    tags = mlflow_client().get_run(record.run_id).data.tags
    return trains.load_train(record.id).after_crash, tags["tuneline.after_crash"]


def test_by_default_a_crashed_train_is_left_as_it_is_and_its_record_says_why(crashes: Crashes) -> None:
    record = crashes.train("one")
    decision = decide_after_crash("one")
    reason = "not resumed: resume_after_crash is 0"
    assert (decision.train, decision.resume, decision.reason) == (record.id, False, reason)
    assert recorded(record) == (reason, reason)
    assert trains.current_status(trains.load_train(record.id)) == "interrupted"


def test_a_train_is_taken_up_as_often_as_it_says_and_no_more(crashes: Crashes) -> None:
    record = crashes.train("one", resume_after_crash=2)
    reasons = []
    for flow_run, following in (("one", "two"), ("two", "three"), ("three", "four")):
        decision = decide_after_crash(flow_run)
        reasons.append(decision.reason)
        assert recorded(record) == (decision.reason, decision.reason)
        crashes.again(record, following)
    assert reasons == [
        "resumed (1 of 2)",
        "resumed (2 of 2)",
        "not resumed: resume_after_crash is 2, and as often it was",
    ]


def test_two_reports_of_one_crash_take_the_train_up_once(crashes: Crashes) -> None:
    record = crashes.train("one", resume_after_crash=5)
    assert decide_after_crash("one").resume
    crashes.again(record, "two")
    late = decide_after_crash("one")
    assert (late.resume, late.reason) == (False, "not resumed: flow run two has taken it up since")
    assert trains.load_train(record.id).crash_resumes == 1


def test_a_train_whose_process_is_alive_is_not_taken_up(crashes: Crashes) -> None:
    record = crashes.train("one", resume_after_crash=5)
    trains.update_train(record.id, status="running")
    program = "import sys, time; from tasks import trains; trains.own_train(sys.argv[1]); print(1); time.sleep(60)"
    command = [sys.executable, "-u", "-c", program, record.id]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        decision = decide_after_crash("one")
        other.kill()
    assert (decision.resume, decision.alive) == (False, True)
    assert trains.load_train(record.id).crash_resumes == 0


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed"])
def test_a_train_that_has_come_to_an_end_is_left_alone(crashes: Crashes, status: Any) -> None:
    record = crashes.train("one", resume_after_crash=5)
    trains.update_train(record.id, status=status, reason=None)
    assert decide_after_crash("one").reason == f"not resumed: the train is {status}"


def test_a_flow_run_of_another_host_is_told(crashes: Crashes) -> None:
    crashes.train("one", resume_after_crash=5)
    assert decide_after_crash("elsewhere").reason.endswith("no train of this host belongs to flow run elsewhere")

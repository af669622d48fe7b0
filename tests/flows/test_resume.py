"""Trains killed, cancelled and taken up again, as real processes: nothing lost, nothing twice, nothing left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.settings import Settings
from methods import contract
from tasks import models, tracking, trains
from tasks.stages import EventTail
from tests.flows.tiny_trains import (
    installation,
    processes_naming,
    resolved,
    start_flow,
    train_file,
    wait_for,
)

STEPS = 30
HYPER = {"max_steps": STEPS, "checkpoint_steps": 3, "lora_dropout": 0.1, "seed": 11}
DRAW = random.Random()  # noqa: S311 - any step must do: each run of the tests tries others


@dataclass
class Place:
    """The installation the tests of this file share, and the train that nobody disturbed."""

    root: Path
    settings: Settings
    undisturbed: ModelRecord

    def weights(self, model: ModelRecord) -> bytes:
        return (model.path / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Place]:
    from flows.customized import customized

    root = tmp_path_factory.mktemp("resume")
    with installation(root) as settings:
        given = resolved(root, "undisturbed", hyper=HYPER)
        model = customized(train=given.config, origins=given.origins)
        yield Place(root, settings, model)
        assert processes_naming(str(settings.root)) == []


def loss_curve(run_id: str) -> list[tuple[int, float]]:
    points = tracking.mlflow_client().get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in points)


def begun(name: str) -> TrainRecord | None:
    return next((record for record in trains.list_trains() if record.config.name == name), None)


def stage_folder(name: str) -> Path:
    record = begun(name)
    return trains.train_folder(record.id) / "training" if record else Path("/nowhere")


def step_reached(name: str) -> int:
    events = EventTail(stage_folder(name) / contract.EVENTS_FILE).read()
    return max((event["step"] for event in events if event["type"] == "metrics"), default=0)


def stage_of(name: str) -> int:
    """The process id of the training stage itself, below its supervisor."""
    return int(json.loads((stage_folder(name) / "process.json").read_text())["stage"])


def flow_at_some_step(place: Place, name: str) -> subprocess.Popen[bytes]:
    """Start the flow in a process of its own and return it when it has reached a step drawn at random."""
    flow = start_flow(place.root, "customized", str(train_file(place.root, name, hyper=HYPER)))
    step = DRAW.randrange(1, STEPS // 2)
    print(f"{name}: to be disturbed at step {step}")
    wait_for(lambda: step_reached(name) >= step or flow.poll() is not None)
    assert flow.poll() is None, (place.root / "flow.log").read_text()
    return flow


def resume(name: str) -> ModelRecord:
    from flows.customized import customized

    return customized(resume=trains.load_train(name).id)


def assert_as_if_undisturbed(place: Place, model: ModelRecord) -> None:
    record = trains.load_train(str(model.train))
    assert (record.status, record.attempts) == ("completed", 2)
    assert loss_curve(record.run_id) == loss_curve(str(place.undisturbed.run_id))
    assert [step for step, _ in loss_curve(record.run_id)] == list(range(1, STEPS + 1))
    assert place.weights(model) == place.weights(place.undisturbed)
    assert tracking.mlflow_client().get_run(record.run_id).info.status == "FINISHED"
    assert processes_naming(record.id) == []


def assert_no_half_made_model(place: Place) -> None:
    for folder in place.settings.models.iterdir():
        assert (folder / models.RECORD_FILE).is_file(), folder


@pytest.mark.parametrize("victim", [pytest.param("parent", marks=pytest.mark.lifecycle), "both"])
def test_flow_killed_at_any_step_is_resumed_to_the_same_curve_and_weights(place: Place, victim: str) -> None:
    name = f"killed-{victim}"
    flow = flow_at_some_step(place, name)
    record = trains.load_train(name)
    assert trains.current_status(record) == "running"
    stage, below = stage_of(name), psutil.Process(flow.pid).children(recursive=True)
    assert stage in {process.pid for process in below}
    flow.kill()
    if victim == "both":
        os.kill(stage, signal.SIGKILL)
    flow.wait()
    assert trains.load_train(name).status == "running"
    assert trains.current_status(record) == "interrupted"
    model = resume(name)
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert_as_if_undisturbed(place, model)
    assert_no_half_made_model(place)


@pytest.mark.lifecycle
def test_stage_killed_alone_is_retried_from_its_checkpoint_by_the_flow(place: Place) -> None:
    from flows.customized import customized

    name = "killed-stage"
    step = DRAW.randrange(4, STEPS // 2)  # after the first checkpoint

    def kill() -> None:
        wait_for(lambda: step_reached(name) >= step)
        os.kill(stage_of(name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    given = resolved(place.root, name, hyper=HYPER)
    model = customized(train=given.config, origins=given.origins)
    killer.join()
    record = trains.load_train(name)
    job = json.loads((stage_folder(name) / contract.JOB_FILE).read_text())
    assert "checkpoint-" in job["resume_from"]
    assert (record.status, record.attempts) == ("completed", 1)
    assert loss_curve(record.run_id) == loss_curve(str(place.undisturbed.run_id))
    assert place.weights(model) == place.weights(place.undisturbed)


@pytest.mark.lifecycle
def test_train_killed_before_its_first_checkpoint_has_each_step_once_after_the_restart(place: Place) -> None:
    from flows.customized import customized

    name, steps = "killed-early", 5 * STEPS  # long enough for MLflow to be told in between
    given = resolved(place.root, name, hyper={**HYPER, "max_steps": steps, "checkpoint_steps": steps})

    def kill() -> None:
        wait_for(lambda: step_reached(name) >= 2)
        # Some points of this attempt are to be in MLflow already; asking for them all the time would hold it up.
        wait_for(lambda: loss_curve(trains.load_train(name).run_id), every=0.2)
        os.kill(stage_of(name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    customized(train=given.config, origins=given.origins)
    killer.join()
    assert json.loads((stage_folder(name) / contract.JOB_FILE).read_text())["resume_from"] is None
    run_id = trains.load_train(name).run_id
    for curve in ("loss", "tokens_per_second"):
        found = [point.step for point in tracking.mlflow_client().get_metric_history(run_id, curve)]
        assert sorted(found) == list(range(1, steps + 1)), curve
    log = (stage_folder(name) / "train.log").read_text()
    assert log.count(f"step 1/{steps} ") == 2  # it was killed, and began again


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.lifecycle)])
def test_flow_that_is_asked_to_end_saves_a_checkpoint_and_is_recorded_as_cancelled(
    place: Place, number: signal.Signals
) -> None:
    name = f"asked-{number.name.lower()}"
    flow = flow_at_some_step(place, name)
    if number == signal.SIGINT:
        os.killpg(flow.pid, number)  # Ctrl-C in a terminal reaches everything in the foreground
    else:
        flow.send_signal(number)
    flow.wait(60)
    assert flow.returncode != 0
    record = trains.load_train(name)
    assert (record.status, trains.current_status(record)) == ("cancelled", "cancelled")
    assert tracking.mlflow_client().get_run(record.run_id).info.status == "KILLED"
    assert processes_naming(record.id) == []
    checkpoints = contract.complete_checkpoints(stage_folder(name) / "checkpoints")
    assert checkpoints[-1].name == f"checkpoint-{step_reached(name)}"
    assert [step for step, _ in loss_curve(record.run_id)] == list(range(1, step_reached(name) + 1))


def test_train_that_runs_cannot_be_resumed_beside_itself(place: Place) -> None:
    from flows.customized import customized

    record = trains.load_train("undisturbed")
    program = (
        "import sys, time; from tasks import trains; trains.own_train(sys.argv[1]); print('owned', flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, record.id], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "owned\n"
    try:
        with pytest.raises(UserError, match="this train is already running"):
            customized(resume=record.id)
    finally:
        other.kill()
        other.wait()
    assert trains.load_train(record.id).attempts == record.attempts


def test_completed_train_resumed_is_left_as_it_is(place: Place) -> None:
    before = trains.load_train("undisturbed")
    assert resume("undisturbed").name == place.undisturbed.name
    after = trains.load_train("undisturbed")
    assert (after.status, after.outcome, after.model) == ("completed", before.outcome, before.model)
    assert len(loss_curve(after.run_id)) == STEPS

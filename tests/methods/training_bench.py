"""Trains of any method on a tiny model: in the test's own process, or in one of their own that is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from methods import contract, supervisor
from methods.registry import find_method
from methods.toolkit import training
from tasks.stages import EventTail, StageJob
from tests.methods.stage_jobs import curve, open_job, training_job, wait_for


class _Built(Exception):
    """Carries a trainer out of a stage that is about to train."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer


@dataclass
class Bench:
    """Trains the tiny model with a method in this process, each time in a new folder."""

    method: str
    base: Path
    rows: Path
    root: Path
    held_back: Path | None = None
    count: int = 0

    def job(self, *, validation: bool = False, **given: Any) -> contract.Job:
        self.count += 1
        folder = self.root / str(self.count)
        return open_job(folder, self.stage_job(folder, validation=validation, **given))

    def stage_job(self, folder: Path, *, validation: bool = False, **given: Any) -> StageJob:
        """The training job; `given` are common hyper-parameters, own parameters of the method and `resume`."""
        held_back = (self.held_back or self.rows) if validation else None
        return training_job(folder, self.base, self.rows, validation=held_back, method=self.method, **given)

    def build(self, *, validation: bool = False, **given: Any) -> Any:
        """The trainer of a job, before its first step."""

        def stop(trainer: Any, job: contract.Job) -> None:
            raise _Built(trainer)

        with patch.object(training, "run_training", stop):
            try:
                self._main(self.job(validation=validation, **given))
            except _Built as built:
                return built.trainer
        raise AssertionError("the stage has built no trainer")

    def train(self, *, validation: bool = False, **given: Any) -> Path:
        """Run the whole stage; returns its job folder."""
        job = self.job(validation=validation, **given)
        contract.write_json(job.folder / contract.RESULT_FILE, self._main(job))
        return job.folder

    def go_on(self, left_alone: Path, step: int, **given: Any) -> Path:
        """Run the stage again from a checkpoint in the middle of a train; returns its job folder."""
        self.count += 1
        folder = self.root / f"{self.count}-from-{step}"
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(left_alone / "checkpoints" / checkpoint.name, checkpoint)
        job = open_job(folder, self.stage_job(folder, resume=checkpoint, **given))
        contract.write_json(folder / contract.RESULT_FILE, self._main(job))
        return folder

    def losses(self, **given: Any) -> list[float]:
        return losses(self.train(**given))

    def _main(self, job: contract.Job) -> dict[str, Any]:
        file = find_method(self.method).stage_file("training")
        stage = import_module(f"methods.{file.parent.name}.{file.stem}")
        result: dict[str, Any] = stage.main(job)
        return result


def losses(folder: Path) -> list[float]:
    """The newest value of the loss at every step."""
    return [values[-1] for _, values in sorted(curve(folder, "loss").items())]


def result_of(folder: Path) -> dict[str, Any]:
    """What the stage of a job folder returned."""
    content: dict[str, Any] = json.loads((folder / contract.RESULT_FILE).read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that training left."""
    files = list((folder / "output").glob("*.safetensors"))
    assert len(files) == 1
    return dict(load_file(files[0]))


def interrupt_at(folder: Path, step: int, act: Callable[[], object]) -> threading.Thread:
    """Do `act` as soon as the stage of the folder reports the step."""
    tail = EventTail(folder / contract.EVENTS_FILE)

    def reached() -> bool:
        return any(event["type"] == "metrics" and event["step"] >= step for event in tail.read())

    def watch() -> None:
        if wait_for(reached, 120, pause=0.002):
            act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill_stage(folder: Path) -> None:
    """Kill the process of the stage that runs in the folder."""
    os.kill(json.loads((folder / supervisor.PROCESS_FILE).read_text())["stage"], signal.SIGKILL)


def same_as(left_alone: Path, resumed: Path, curves: tuple[str, ...], steps: int, first: int = 1) -> None:
    """Every value of every curve from step `first` on, those before and after the interruption, and the final weights
    bit by bit."""
    for name in curves:
        expected, found = curve(left_alone, name), curve(resumed, name)
        assert set(expected) == set(range(1, steps + 1)), name
        assert set(found) == set(range(first, steps + 1)), name
        for step, values in found.items():
            assert values == expected[step] * len(values), (name, step)
    expected_weights, found_weights = weights(left_alone), weights(resumed)
    assert expected_weights.keys() == found_weights.keys()
    assert all(torch.equal(expected_weights[name], found_weights[name]) for name in expected_weights)
    assert abs(result_of(resumed)["loss"] / result_of(left_alone)["loss"] - 1) < 1e-6
    assert result_of(resumed)["steps"] == steps


def schedule(trainer: Any, steps: int) -> list[float]:
    """The learning rate of each of so many steps."""
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(steps, trainer.optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
        assert scheduler.get_last_lr() == [rates[-1]] * len(trainer.optimizer.param_groups)  # what the curve shows
        trainer.optimizer.step()
        scheduler.step()
    return rates

"""Stages for tests: small ones written on the spot, and the jobs of the built-in method."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from configs.train import Hyperparameters, TrainConfig
from methods import contract, supervisor
from methods.registry import find_method
from tasks.stages import EventTail, StageJob, run_stage


def write_stage(folder: Path, body: str) -> Path:
    """A stage file whose `main(job)` has `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stage.py"
    path.write_text(
        "import os, signal, subprocess, sys, time\nfrom methods import contract\n\n\ndef main(job):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\n\nif __name__ == '__main__':\n    contract.run(main)\n"
    )
    return path


def small_job(folder: Path, **inputs: Any) -> StageJob:
    """A job without parameters."""
    return StageJob(stage="training", parameters={}, inputs=inputs, output=folder / "output", seed=1)


def signal_running(folder: Path) -> bool:
    """Ask the stage that runs in `folder` to stop; False if none runs."""
    try:
        content = json.loads((folder / supervisor.PROCESS_FILE).read_text())
        psutil.Process(content["supervisor"]).terminate()
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False
    return True


@dataclass
class Running:
    """A stage that `run_stage` runs in a thread."""

    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    outcome: Future[dict[str, Any]] = field(default_factory=Future)


def start_stage(folder: Path, body: str, grace: float = 10) -> Running:
    """Run a stage with `body` and come back once it has written the file `ready` into its folder."""
    running = Running(folder)
    file = write_stage(folder, body)
    pool = ThreadPoolExecutor(1)
    running.outcome = pool.submit(
        run_stage, folder, small_job(folder), Path(sys.executable), file, grace, running.events.extend
    )
    pool.shutdown(wait=False)
    assert wait_for(lambda: (folder / "ready").exists() or running.outcome.done(), 20)
    return running


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every running process but this one that names the folder in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        running = process.info["status"] != psutil.STATUS_ZOMBIE
        if running and any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def training_job(
    folder: Path,
    base: Path,
    rows: Path,
    *,
    validation: Path | None = None,
    resume: Path | None = None,
    method: str = "sft",
    models: dict[str, Any] | None = None,
    **given: Any,
) -> StageJob:
    """A training job as `tasks.trains` makes it; `given` are common hyper-parameters and the method's own.

    `models` are those that it is given, by parameter, as a stage finds them.
    """
    chosen = find_method(method)
    hyper = {name: value for name, value in given.items() if name in Hyperparameters.model_fields}
    config = TrainConfig(
        name="t",
        method=method,
        base_model=str(base),
        dataset=str(rows),
        validation_dataset=str(validation) if validation else None,
        max_new_tokens=8,
        hyperparameters=Hyperparameters(**{**chosen.hyperparameter_defaults, **hyper}),
        method_params={name: value for name, value in given.items() if name not in hyper},
    )
    return StageJob(
        stage="training",
        parameters=chosen.job_parameters(config),
        inputs={
            "base_model": str(base),
            "train_rows": str(rows),
            "validation_rows": str(validation) if validation else None,
            "models": models or {},
            "files": {name: value for name, value in given.items() if name not in hyper and chosen.takes_file(name)},
        },
        output=folder / "output",
        resume_from=resume,
        seed=config.hyperparameters.seed,
    )


def open_job(folder: Path, job: StageJob) -> contract.Job:
    """The job as the stage itself sees it, for work inside of the test's own process."""
    folder.mkdir(parents=True, exist_ok=True)
    job.output.mkdir(parents=True, exist_ok=True)
    contract.write_json(folder / contract.JOB_FILE, job.model_dump(mode="json"))
    return contract.Job(folder)


def run_method(folder: Path, job: StageJob, grace: float = 30, method: str = "sft") -> dict[str, Any]:
    """Run a stage of a built-in method as the system does: a process of its own."""
    file = find_method(method).stage_file(job.stage)  # type: ignore[arg-type]
    return run_stage(folder, job, Path(sys.executable), file, grace, lambda events: None)


def curve(folder: Path, name: str) -> dict[int, list[float]]:
    """Every value of a curve by step: more than one where steps were repeated after a resume."""
    found: dict[int, list[float]] = {}
    for event in EventTail(folder / contract.EVENTS_FILE).read():
        if event["type"] == "metrics" and name in event["values"]:
            found.setdefault(event["step"], []).append(event["values"][name])
    return found

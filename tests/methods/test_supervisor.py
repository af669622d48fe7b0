"""Who owns a stage ends it: real processes, signalled in every way, counted afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from methods import contract, supervisor
from tasks.stages import StageCancelled, StageKilled, run_stage
from tests.methods.stage_jobs import (
    Running,
    processes_of,
    signal_running,
    small_job,
    start_stage,
    wait_for,
    write_stage,
)

# A child in the stage's process group, one in a session of its own, and a child of that one whose parent is gone.
SPAWN = """
sleep = [sys.executable, "-c", "import time; time.sleep(600)", str(job.folder)]
subprocess.Popen(sleep)
subprocess.Popen(sleep, start_new_session=True)
double = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
subprocess.run([sys.executable, "-c", double, *sleep])
"""
LISTEN = """
(job.folder / "ready").touch()
while not job.cancelled:
    time.sleep(0.02)
(job.folder / "saved").touch()
raise contract.Cancelled
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(job.folder / "ready").touch()
time.sleep(600)
"""
NOT_LISTENING_YET = """
signal.signal(signal.SIGTERM, signal.SIG_DFL)
(job.folder / "ready").touch()
time.sleep(600)
"""
RUNNER = """
import sys
from pathlib import Path
from tasks.stages import StageJob, run_stage
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
job = StageJob(stage="training", parameters={}, inputs={}, output=folder / "output", seed=1)
run_stage(folder, job, Path(sys.executable), file, 10.0, lambda events: None)
"""


def start_runner(folder: Path, body: str) -> subprocess.Popen[bytes]:
    """`run_stage` in a process of its own, up to the point where the stage is ready."""
    file = write_stage(folder, body)
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder), str(file)], cwd=PROJECT_ROOT, stderr=subprocess.DEVNULL
    )
    assert wait_for(lambda: (folder / "ready").exists(), 20)
    return runner


def process_ids(folder: Path) -> dict[str, int]:
    content: dict[str, int] = json.loads((folder / supervisor.PROCESS_FILE).read_text())
    return content


def nothing_left(folder: Path, seconds: float = 10) -> bool:
    return wait_for(lambda: not processes_of(folder), seconds)


def test_a_killed_parent_lets_the_stage_save_and_leaves_nothing_running(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, SPAWN + LISTEN)
    assert len(processes_of(tmp_path)) == 6  # runner, supervisor, stage and its three
    runner.kill()
    runner.wait()
    assert nothing_left(tmp_path)
    assert (tmp_path / "saved").exists()


def test_a_killed_supervisor_takes_the_stage_and_all_of_its_children_with_it(tmp_path: Path) -> None:
    running = start_stage(tmp_path, SPAWN + LISTEN)
    assert len(processes_of(tmp_path)) == 5
    os.kill(process_ids(tmp_path)["supervisor"], signal.SIGKILL)
    with pytest.raises(StageKilled, match="supervisor was ended by signal 9"):
        running.outcome.result(20)
    assert nothing_left(tmp_path)


def test_parent_and_supervisor_killed_together_leave_no_stage(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, LISTEN)
    runner.kill()
    os.kill(process_ids(tmp_path)["supervisor"], signal.SIGKILL)
    runner.wait()
    assert nothing_left(tmp_path)


def test_what_outlived_runner_and_supervisor_is_ended_before_the_next_attempt(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, SPAWN + LISTEN)
    runner.kill()
    os.kill(process_ids(tmp_path)["supervisor"], signal.SIGKILL)
    runner.wait()
    assert wait_for(lambda: len(processes_of(tmp_path)) == 3, 10)
    file = write_stage(tmp_path, "return {}")
    run_stage(tmp_path, small_job(tmp_path), Path(sys.executable), file, 5, lambda _: None)
    assert nothing_left(tmp_path)


def test_a_killed_stage_is_told_as_killed_and_its_children_are_swept(tmp_path: Path) -> None:
    running = start_stage(tmp_path, SPAWN + LISTEN)
    os.kill(process_ids(tmp_path)["stage"], signal.SIGKILL)
    with pytest.raises(StageKilled, match=r"signal 9 .*memory"):
        running.outcome.result(20)
    assert nothing_left(tmp_path)


def test_children_that_outlive_a_finished_stage_are_swept(tmp_path: Path) -> None:
    running = start_stage(tmp_path, SPAWN + "(job.folder / 'ready').touch()\nreturn {'a': 1}")
    assert running.outcome.result(20) == {"status": "completed", "a": 1}
    assert nothing_left(tmp_path)


def test_signal_running_cancels_and_the_stage_saves(tmp_path: Path) -> None:
    running = start_stage(tmp_path, SPAWN + LISTEN)
    assert signal_running(tmp_path)
    with pytest.raises(StageCancelled):
        running.outcome.result(20)
    assert (tmp_path / "saved").exists()
    assert nothing_left(tmp_path)
    assert not signal_running(tmp_path)


def test_a_stage_cancelled_before_it_listens_is_cancelled_and_not_killed(tmp_path: Path) -> None:
    # Importing torch takes seconds: told as killed, such a train would be taken for a crash and tried again.
    running = start_stage(tmp_path, NOT_LISTENING_YET)
    assert signal_running(tmp_path)
    with pytest.raises(StageCancelled):
        running.outcome.result(20)


def test_a_deaf_stage_is_killed_after_the_grace_and_not_before(tmp_path: Path) -> None:
    running = start_stage(tmp_path, SPAWN + DEAF, grace=1.5)
    asked = time.monotonic()
    assert signal_running(tmp_path)
    with pytest.raises(StageCancelled):
        running.outcome.result(20)
    assert 1.5 <= time.monotonic() - asked < 6
    assert nothing_left(tmp_path)


def test_a_second_runner_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    running = start_stage(tmp_path, LISTEN)
    before = (tmp_path / contract.JOB_FILE).read_bytes()
    with pytest.raises(UserError, match="already running"):
        run_stage(tmp_path, small_job(tmp_path, other=1), Path(sys.executable), tmp_path / "stage.py", 5, print)
    assert (tmp_path / contract.JOB_FILE).read_bytes() == before
    assert signal_running(tmp_path)
    with pytest.raises(StageCancelled):
        running.outcome.result(20)


def test_the_folder_of_a_killed_runner_stays_locked_while_its_stage_saves(tmp_path: Path) -> None:
    slow = LISTEN.replace('(job.folder / "saved").touch()', 'time.sleep(2)\n(job.folder / "saved").touch()')
    runner = start_runner(tmp_path, slow)
    runner.kill()
    runner.wait()
    with pytest.raises(UserError, match="already running"):
        run_stage(tmp_path, small_job(tmp_path), Path(sys.executable), tmp_path / "stage.py", 5, print)
    assert nothing_left(tmp_path)
    file = write_stage(tmp_path, "return {}")
    assert run_stage(tmp_path, small_job(tmp_path), Path(sys.executable), file, 5, lambda _: None)


def test_ctrl_c_in_the_runner_cancels_the_stage(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, SPAWN + LISTEN)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(20) == -signal.SIGINT
    assert (tmp_path / "saved").exists()
    assert nothing_left(tmp_path)


def test_settings_of_the_servers_do_not_reach_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_KEY", "MLFLOW_TRACKING_PASSWORD", "TUNELINE_HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    running: Running = start_stage(tmp_path, "return {'environment': dict(os.environ)}")
    seen = running.outcome.result(20)["environment"]
    assert "secret" not in seen.values()
    assert not [name for name in seen if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_"))]
    assert seen["CUDA_VISIBLE_DEVICES"] == "3"

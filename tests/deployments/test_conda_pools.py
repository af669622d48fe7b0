"""Trains through a real conda, on workers of their own: where they run, and what is left when something dies.

Every run carries a mark in its environment, which all its processes inherit, whatever becomes of their parents.
"""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from deployments import services
from deployments.work_pools import ensure_pool
from tasks.processes import OUTLIVES_VARIABLE
from tests.conda import make_conda_environment, real_conda
from tests.deployments.server import Server, installation_with_servers, wait_for

pytestmark = pytest.mark.operations

MARK = "MARKED_BY_TEST"
ENDED = ("Completed", "Failed", "Crashed", "Cancelled")
ENDLESS = {"max_steps": 1_000_000, "checkpoint_steps": 1_000_000}
# Every stage of this environment takes longer to save its checkpoint than Prefect waits for a cancelled run.
SLOW_TO_SAVE = """
import os, time
if "STAGE_JOB_FOLDER" in os.environ:
    from methods import contract
    mark_complete = contract.mark_complete
    def slowly(checkpoint):
        time.sleep(45)
        mark_complete(checkpoint)
    contract.mark_complete = slowly
"""


@dataclass
class Run:
    """A flow run of a pool, and the mark of its processes."""

    server: Server
    id: str
    mark: str

    @property
    def state(self) -> str:
        return self.server.state(self.id)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def process(self, module: str) -> psutil.Process:
        (found,) = [process for process in self.processes() if process.cmdline()[1:3] == ["-m", module]]
        return found

    def cancel(self) -> None:
        state = {"type": "CANCELLING", "name": "Cancelling"}
        self.server.post(f"/flow_runs/{self.id}/set_state", {"state": state})

    def is_gone(self) -> bool:
        return not self.processes()


class Pools:
    """Work pools with conda environments on one host, a worker each."""

    def __init__(self, server: Server) -> None:
        self.server, self.envs = server, server.root / "envs"
        self.conda = str(real_conda())
        self.workers: dict[str, int] = {}

    def add(self, pool: str, environment: str) -> None:
        make_conda_environment(self.envs / environment)
        self.join(pool)
        with SyncPrefectClient(self.server.api) as client:
            ensure_pool(client, pool, {"conda": self.conda, "environment": environment})

    def join(self, pool: str) -> None:
        (worker,) = services.join(self.server.settings, pool)
        assert worker.pid is not None
        self.workers[pool] = worker.pid

    def kill_worker(self, pool: str) -> None:
        worker = psutil.Process(self.workers[pool])
        worker.kill()
        worker.wait(10)

    def start(self, title: str, parameters: dict[str, Any], **variables: str) -> Run:
        mark = uuid.uuid4().hex
        env = {"CONDA_ENVS_DIRS": str(self.envs), MARK: mark}
        body = {"parameters": parameters, "job_variables": {**variables, "env": env}}
        run = self.server.post(f"/deployments/{self.server.deployment(title)['id']}/create_flow_run", body)
        return Run(self.server, run["id"], mark)

    def logs(self, run: Run) -> list[str]:
        of_run = {"logs": {"flow_run_id": {"any_": [run.id]}}}
        return [line["message"] for line in self.server.post("/logs/filter", of_run)]

    def training(self, name: str, run: Run) -> Path:
        """The folder of the training stage of a run, once it has made its first step."""
        folders: list[Path] = []

        def found() -> bool:
            events = self.server.settings.trains.glob(f"{name}_*/training/events.jsonl")
            folders[:] = [path.parent for path in events if '"metrics"' in path.read_text()]
            return bool(folders)

        wait_for(found, tell=lambda: self.server.told(run.id))
        return folders[0]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    with installation_with_servers(tmp_path_factory.mktemp("pools")) as server:
        pools = Pools(server)
        pools.add("conda-a", "ft-a")
        yield pools


@contextmanager
def nothing_left_of(run: Run) -> Iterator[Run]:
    """Whatever a failing test leaves running is ended all the same."""
    try:
        yield run
    finally:
        for process in run.processes():
            process.kill()


def saved(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/checkpoint-*/complete"))


def stage_of(folder: Path) -> psutil.Process:
    return psutil.Process(json.loads((folder / "process.json").read_text())["stage"])


def test_two_pools_train_in_their_own_environments_and_a_cancel_leaves_checkpoints_only(pools: Pools) -> None:
    pools.add("conda-b", "ft-b")
    runs = {
        letter: pools.start(f"customized/sft@conda-{letter}", pools.server.train(f"in-{letter}", **ENDLESS))
        for letter in "ab"
    }
    with nothing_left_of(runs["a"]), nothing_left_of(runs["b"]):
        folders = {letter: pools.training(f"in-{letter}", run) for letter, run in runs.items()}
        for letter, folder in folders.items():
            stage, name = stage_of(folder), f"ft-{letter}"
            environment = stage.environ()
            assert stage.cmdline()[0] == str(pools.envs / name / "bin" / "python")
            assert environment["CONDA_DEFAULT_ENV"] == name
            assert environment["ACTIVATED_BY_CONDA"] == name
            assert environment[MARK] == runs[letter].mark
        for run in runs.values():
            assert len(run.processes()) >= 6  # launcher, conda, its shell, prefect, engine, supervisor, stage
            run.cancel()
        for letter, run in runs.items():
            wait_for(lambda run=run: run.state in ENDED)  # type: ignore[misc]
            wait_for(run.is_gone)
            assert run.state == "Cancelled"
            assert saved(folders[letter])
            assert pools.server.record(f"in-{letter}").status == "cancelled"


def test_an_unknown_environment_is_named_on_the_page_with_those_there_are(pools: Pools) -> None:
    run = pools.start("customized/sft@conda-a", pools.server.train("nowhere"), environment="ft-none")
    wait_for(lambda: run.state in ENDED)
    state = pools.server.http.get(f"/flow_runs/{run.id}").json()["state"]
    told = [text for text in pools.logs(run) if "ft-none" in text]
    assert state["name"] == "Crashed"
    for text in (state["message"], told[0]):
        assert "environment = 'ft-none'" in text
        assert "Not a conda environment" in text  # in conda's own words
        assert "ft-a" in text
        assert "to mend: create it on this host" in text
    wait_for(run.is_gone)


def test_an_environment_without_tuneline_is_told_of_in_the_logs(pools: Pools) -> None:
    bare = make_conda_environment(pools.envs / "ft-bare")
    (packages,) = bare.glob("lib/python*/site-packages")
    (packages / "sitecustomize.py").write_text("import sys; sys.modules['flows'] = None\n")
    run = pools.start("customized/sft@conda-a", pools.server.train("bare"), environment="ft-bare")
    wait_for(lambda: run.state in ENDED)
    assert run.state == "Crashed"
    wait_for(run.is_gone)
    told = [text for text in pools.logs(run) if "environment = 'ft-bare'" in text]
    assert "No module named 'flows.customized'" in told[0]


def test_a_stage_that_saves_longer_than_prefect_waits_still_saves_and_leaves_nothing(pools: Pools) -> None:
    slow = make_conda_environment(pools.envs / "ft-slow")
    (packages,) = slow.glob("lib/python*/site-packages")
    (packages / "sitecustomize.py").write_text(SLOW_TO_SAVE)
    run = pools.start("customized/sft@conda-a", pools.server.train("slow", **ENDLESS), environment="ft-slow")
    with nothing_left_of(run):
        folder = pools.training("slow", run)
        run.cancel()
        wait_for(lambda: run.state in ENDED)
        assert run.state == "Cancelled"
        assert not saved(folder)  # Prefect has given up, and killed what it had started
        wait_for(run.is_gone)
        assert saved(folder)


def test_a_train_survives_the_death_of_its_worker_and_completes(pools: Pools) -> None:
    run = pools.start("customized/sft@conda-a", pools.server.train("survivor", max_steps=60))
    with nothing_left_of(run):
        pools.training("survivor", run)
        pools.kill_worker("conda-a")
        assert run.state == "Running"
        wait_for(lambda: run.state in ENDED)
        wait_for(run.is_gone)
        assert run.state == "Completed"
        assert pools.server.record("survivor").status == "completed"
    pools.join("conda-a")


def test_a_train_whose_worker_has_died_can_be_cancelled(pools: Pools) -> None:
    run = pools.start("customized/sft@conda-a", pools.server.train("orphan", **ENDLESS))
    with nothing_left_of(run):
        folder = pools.training("orphan", run)
        pools.kill_worker("conda-a")
        run.cancel()
        wait_for(lambda: run.state in ENDED)
        wait_for(run.is_gone)
        assert run.state == "Cancelled"
        assert saved(folder)
        assert pools.server.record("orphan").status == "cancelled"
    pools.join("conda-a")


def test_a_killed_flow_is_crashed_and_its_stage_ends_with_a_checkpoint(pools: Pools) -> None:
    run = pools.start("customized/sft@conda-a", pools.server.train("killed", **ENDLESS))
    with nothing_left_of(run):
        folder = pools.training("killed", run)
        run.process("prefect.engine").send_signal(signal.SIGKILL)
        wait_for(lambda: run.state in ENDED)
        wait_for(run.is_gone)
        assert run.state == "Crashed"
        assert saved(folder)


def test_an_endpoint_outlives_the_flow_run_that_has_started_it(pools: Pools) -> None:
    parameters = {"model": str(pools.server.root / "tiny"), "endpoint": "outliving"}
    run = pools.start("deployed/from-model@conda-a", parameters)
    with nothing_left_of(run):
        wait_for(lambda: run.state in ENDED, 180)
        assert run.state == "Completed", pools.server.http.get(f"/flow_runs/{run.id}").text
        wait_for(lambda: all(OUTLIVES_VARIABLE in process.environ() for process in run.processes()))
        record = json.loads((pools.server.settings.endpoints / "outliving" / "endpoint.json").read_text())
        address = f"http://127.0.0.1:{record['gateway']['port']}/v1/models"
        assert httpx.get(address, trust_env=False, timeout=30).is_success
        assert len(run.processes()) >= 2  # the gateway and the server of the model
        undeploy = pools.start("undeploy/endpoint@conda-a", {"endpoint": "outliving"})
        wait_for(lambda: undeploy.state in ENDED)
        assert undeploy.state == "Completed"
        wait_for(lambda: len(run.processes()) <= 1)  # the gateway says that nothing is served

"""What dies while a train runs: host, flow, servers. Nothing is lost, nothing runs twice, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.records import TrainRecord
from configs.services import ServiceName
from configs.settings import SILENCE_SECONDS
from deployments import services
from methods import contract
from tests.deployments.server import Server, installation_with_servers, processes_naming, wait_for
from tests.flows.command_line import printed, tuneline

pytestmark = pytest.mark.operations

STEPS = 60
SERVICES: tuple[ServiceName, ...] = ("prefect", "mlflow", "worker")
DATABASES = ("TUNELINE_PREFECT_DATABASE", "TUNELINE_MLFLOW_DATABASE")
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "NotResumed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("crashes")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> TrainRecord:
    """The train that nobody disturbs, to compare with."""
    run = start(server, "undisturbed", max_steps=STEPS)
    wait_for(lambda: server.state(run) in ENDED)
    return server.record("undisturbed")


def start(server: Server, name: str, *, resume_after_crash: int = 0, **hyper: Any) -> str:
    parameters = server.train(name, lora_dropout=0.1, checkpoint_steps=5, **hyper)
    parameters["train"]["resume_after_crash"] = resume_after_crash
    answer = server.start("customized/sft", parameters)
    assert answer.is_success, answer.text
    return str(answer.json()["id"])


def folder(server: Server, name: str) -> Path:
    (found,) = server.settings.trains.glob(f"{name}_*")
    return found / "training"


def step_reached(server: Server, name: str) -> int:
    files = list(server.settings.trains.glob(f"{name}_*/training/{contract.EVENTS_FILE}"))
    if not files:
        return 0
    events = [json.loads(line) for line in files[0].read_text().splitlines() if '"metrics"' in line]
    return max((int(event["step"]) for event in events), default=0)


def wait_for_step(server: Server, name: str, step: int) -> None:
    wait_for(lambda: step_reached(server, name) >= step)


def curve(server: Server, record: TrainRecord, name: str = "loss") -> list[tuple[int, float]]:
    """The points of a curve as MLflow has them, those that are there twice included."""
    asked = {"run_id": record.run_id, "metric_key": name, "max_results": "10000"}
    answer = httpx.get(f"{server.mlflow}/api/2.0/mlflow/metrics/get-history", params=asked, trust_env=False)
    points = answer.raise_for_status().json().get("metrics", [])
    return sorted((int(point["step"]), float(point["value"])) for point in points)


def service(server: Server, name: ServiceName) -> psutil.Process:
    (told,) = [item for item in services.status(server.settings) if item.name == name]
    assert told.pid is not None
    return psutil.Process(told.pid)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL all at once: nobody has the time to end another in order. Stopped first, so that nobody sees one die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
    assert psutil.wait_procs(processes, timeout=20)[1] == []


def tree(*roots: psutil.Process) -> list[psutil.Process]:
    return [each for root in roots for each in (root, *root.children(recursive=True))]


def run_of(server: Server, title: str, since: float) -> dict[str, Any] | None:
    """The newest flow run of a deployment."""
    asked = {"deployments": {"id": {"any_": [server.deployment(title)["id"]]}}, "sort": "EXPECTED_START_TIME_DESC"}
    found = [run for run in server.post("/flow_runs/filter", asked) if _seconds(run["created"]) >= since]
    return dict(found[0]) if found else None


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def ended_run_of(server: Server, title: str, since: float, seconds: float) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def ended() -> bool:
        run = run_of(server, title, since)
        found[:] = [run] if run is not None and run["state"]["name"] in ENDED else []
        return bool(found)

    wait_for(ended, seconds)
    return found[0]


def assert_as_if_undisturbed(server: Server, record: TrainRecord, undisturbed: TrainRecord) -> None:
    assert (record.status, record.attempts) == ("completed", 2)
    assert curve(server, record) == curve(server, undisturbed)
    assert [step for step, _ in curve(server, record)] == list(range(1, STEPS + 1))
    weights = [server.settings.models / str(each.model) / "adapter_model.safetensors" for each in (record, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert processes_naming(record.id) == []


def test_a_flow_killed_alone_is_taken_up_by_its_policy_once_its_stage_has_ended(
    server: Server, undisturbed: TrainRecord
) -> None:
    begun = time.time()
    run = start(server, "killed-flow", max_steps=STEPS, resume_after_crash=2)
    wait_for_step(server, "killed-flow", 7)
    owner = json.loads((folder(server, "killed-flow").parent / "owner.json").read_text())
    psutil.Process(owner["pid"]).kill()

    wait_for(lambda: server.state(run) == "Crashed", 30)
    resumed = ended_run_of(server, "resume/after-crash", begun, 120)
    assert resumed["state"]["name"] == "Completed"
    record = server.record("killed-flow")
    assert (record.after_crash, record.crash_resumes) == ("resumed (1 of 2)", 1)
    assert (record.flow_run_id, record.earlier_flow_runs) == (resumed["id"], [run])
    assert_as_if_undisturbed(server, record, undisturbed)


def test_without_a_policy_a_crashed_train_waits_to_be_asked(server: Server, undisturbed: TrainRecord) -> None:
    begun = time.time()
    run = start(server, "asked", max_steps=STEPS)
    wait_for_step(server, "asked", 7)
    owner = json.loads((folder(server, "asked").parent / "owner.json").read_text())
    psutil.Process(owner["pid"]).kill()

    wait_for(lambda: server.state(run) == "Crashed", 30)
    decided = ended_run_of(server, "resume/after-crash", begun, 120)
    assert decided["state"]["name"] == "NotResumed"
    assert decided["state"]["message"] == "not resumed: resume_after_crash is 0"
    assert server.record("asked").status == "interrupted"

    asked = server.start("resume/train", {"train": "asked"}).json()["id"]
    wait_for(lambda: server.state(asked) in ENDED, 120)
    assert server.state(asked) == "Completed"
    assert_as_if_undisturbed(server, server.record("asked"), undisturbed)

    # Retry of the run that crashed, although another one has taken its train up: it is found, and it is complete.
    server.retry(run)
    wait_for(lambda: server.record("asked").attempts == 3)
    wait_for(lambda: server.state(run) in ENDED)
    assert server.state(run) == "Completed"
    assert curve(server, server.record("asked")) == curve(server, undisturbed)


def test_a_crashed_run_is_retried_on_the_page_as_the_same_run_and_the_same_train(
    server: Server, undisturbed: TrainRecord
) -> None:
    run = start(server, "retried", max_steps=STEPS)
    wait_for_step(server, "retried", 7)
    owner = json.loads((folder(server, "retried").parent / "owner.json").read_text())
    psutil.Process(owner["pid"]).kill()
    wait_for(lambda: server.state(run) == "Crashed", 30)
    time.sleep(5)  # a person takes longer; within a second the report of the old attempt would come after it
    server.retry(run)
    wait_for(lambda: server.state(run) in ENDED and server.record("retried").status == "completed", 120)
    assert server.state(run) == "Completed"
    assert_as_if_undisturbed(server, server.record("retried"), undisturbed)


@pytest.mark.parametrize("stage", ["evaluation", "training"])
def test_a_train_in_a_worker_is_cancelled_from_the_command_line_in_any_stage(server: Server, stage: str) -> None:
    from tasks.trains import cancel_train

    name = f"cancelled-in-{stage}"
    parameters = server.train(name, max_steps=1_000_000, checkpoint_steps=1_000_000)
    if stage == "evaluation":
        # The answers of a model that has not learned to stop take as long as they may be.
        parameters["train"] |= {"evaluation_dataset": str(server.root / "rows.jsonl"), "max_new_tokens": 100_000}
    run = server.start("customized/sft", parameters).json()["id"]

    def at_work() -> bool:
        if stage == "training":
            return step_reached(server, name) > 0
        return bool(processes_naming(str(server.settings.root / "inference-")))

    wait_for(at_work)
    cancel_train(server.record(name))
    # Its flow ends with an exception, which Prefect calls Failed until the flow's hook has said why.
    wait_for(lambda: server.state(run) == "Cancelled", 60, lambda: server.told(run))
    record = server.record(name)
    assert (record.status, record.reason) == ("cancelled", "asked to stop")
    assert processes_naming(str(server.settings.root / "inference-")) == processes_naming(record.id) == []


def test_a_stage_that_takes_longer_to_stop_than_prefect_waits_is_cancelled_all_the_same(server: Server) -> None:
    run = start(server, "slow-to-stop", max_steps=1_000_000)
    wait_for_step(server, "slow-to-stop", 7)
    stage = psutil.Process(json.loads((folder(server, "slow-to-stop") / "process.json").read_text())["stage"])
    stage.suspend()  # it can do nothing for 40 seconds
    server.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    time.sleep(40)
    stage.resume()
    wait_for(lambda: server.state(run) == "Cancelled", 60)
    wait_for(lambda: server.record("slow-to-stop").status == "cancelled", 30)
    wait_for(lambda: not processes_naming(str(folder(server, "slow-to-stop"))), 30)
    saved = contract.complete_checkpoints(folder(server, "slow-to-stop") / "checkpoints")
    assert saved[-1].name == f"checkpoint-{step_reached(server, 'slow-to-stop')}"


def test_a_train_goes_on_while_both_servers_are_killed_and_started_again(server: Server) -> None:
    # Long enough to be still at work when a run that is not heard of any more would be marked as crashed.
    name, steps = "servers-gone", 3_000
    run = start(server, name, max_steps=steps)
    wait_for_step(server, name, 20)
    before = step_reached(server, name)
    kill([*tree(service(server, "prefect")), *tree(service(server, "mlflow"))])
    time.sleep(10)
    assert step_reached(server, name) > before
    services.up(server.settings)
    back = time.monotonic()
    wait_for(lambda: server.state(run) in ENDED, 280)
    print(f"ended {time.monotonic() - back:.0f} s after the servers were back")
    assert server.state(run) == "Completed"
    record = server.record(name)
    assert (record.status, record.attempts, record.crash_resumes) == ("completed", 1, 0)
    assert [step for step, _ in curve(server, record)] == list(range(1, steps + 1))
    assert (
        httpx.get(f"{server.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": record.run_id}, trust_env=False).json()[
            "run"
        ]["info"]["status"]
        == "FINISHED"
    )


def test_a_lost_host_is_noticed_and_its_trains_go_on_when_it_is_back(server: Server, undisturbed: TrainRecord) -> None:
    begun = time.time()
    policy = start(server, "lost-policy", max_steps=STEPS, resume_after_crash=1)
    wait_for_step(server, "lost-policy", 7)
    worker = service(server, "worker")
    # Found by their environment too: a supervisor leads a session of its own.
    lost = [*tree(worker), *processes_naming(str(folder(server, "lost-policy")))]
    kill(list({process.pid: process for process in lost}.values()))
    assert processes_naming(server.record("lost-policy").id) == []
    silent = time.monotonic()

    wait_for(lambda: server.state(policy) == "Crashed", SILENCE_SECONDS + 60)
    print(f"marked as crashed after {time.monotonic() - silent:.0f} s")
    assert "No heartbeat" in server.http.get(f"/flow_runs/{policy}").json()["state"]["message"]
    waiting = run_of(server, "resume/after-crash", begun)
    assert waiting is None or waiting["state"]["name"] in ("Scheduled", "Late")

    services.up(server.settings)  # the host is back: only the worker was missing
    resumed = ended_run_of(server, "resume/after-crash", begun, 180)
    assert resumed["state"]["name"] == "Completed"
    record = server.record("lost-policy")
    assert record.after_crash == "resumed (1 of 1)"
    assert_as_if_undisturbed(server, record, undisturbed)


def test_a_run_wrongly_taken_for_crashed_is_running_again(server: Server) -> None:
    begun = time.time()
    run = start(server, "alive", max_steps=1_500, resume_after_crash=3)
    wait_for_step(server, "alive", 7)
    state = {"type": "CRASHED", "name": "Crashed", "message": "No heartbeat"}
    server.post(f"/flow_runs/{run}/set_state", {"state": state, "force": True})
    decided = ended_run_of(server, "resume/after-crash", begun, 90)
    assert decided["state"]["message"] == "not resumed: its process is alive"
    assert server.state(run) == "Running"
    wait_for(lambda: server.state(run) in ENDED, 200)
    assert server.state(run) == "Completed"
    assert (server.record("alive").attempts, server.record("alive").crash_resumes) == (1, 0)


def test_after_a_reboot_everything_stands_again_and_what_was_interrupted_is_told(server: Server) -> None:
    run = start(server, "rebooted", max_steps=1_000_000)
    wait_for_step(server, "rebooted", 7)
    roots = [service(server, name) for name in SERVICES]
    gone = tree(*roots) + processes_naming(str(folder(server, "rebooted")))
    kill(list({process.pid: process for process in gone}.values()))

    settings = server.settings
    ports = {"TUNELINE_PREFECT_PORT": str(settings.prefect_port), "TUNELINE_MLFLOW_PORT": str(settings.mlflow_port)}
    databases = {name: value for name, value in os.environ.items() if name in DATABASES}
    told = printed(tuneline("up", home=settings.root, cwd=server.root, extra=ports | databases))

    assert {item.state for item in services.status(server.settings)} == {"running"}
    record = server.record("rebooted")
    assert f"{record.id} is interrupted" in told
    assert f"tuneline trains resume {record.id}" in told
    assert record.status == "interrupted"
    assert server.state(run) == "Crashed", server.told(run)
    assert processes_naming(str(folder(server, "rebooted"))) == []

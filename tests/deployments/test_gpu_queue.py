"""Trains from the Prefect page share the GPU slots of a host: real servers, a real worker, real stages, no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.records import TrainRecord
from configs.settings import Settings
from deployments import services
from tasks import gpus
from tests.postgres import own_databases
from tests.tiny_models import make_tiny_chat_model

pytestmark = pytest.mark.operations

ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


class Host:
    """The servers of an installation and the trains started on it, with the GPUs that their stages were seen with."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self.settings, self.root = settings, root
        api = f"http://127.0.0.1:{settings.prefect_port}/api"
        self.http = httpx.Client(base_url=api, trust_env=False, timeout=30)
        self.seen: dict[str, set[str]] = {}
        self.given: dict[str, datetime] = {}
        self._watching = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def start(self, name: str, devices: str, queue: str = "default", **changes: Any) -> str:
        """Start a train on a host with those devices, from a work queue; returns the id of the flow run."""
        train = {
            "name": name,
            "base_model": str(self.root / "tiny"),
            "dataset": str(self.root / "rows.jsonl"),
            "method": "sft",
            "hyperparameters": {"batch_size": 4, "max_seq_length": 128, "max_steps": 6},
            **changes,
        }
        deployment = self.http.get("/deployments/name/customized/sft").json()["id"]
        body = {
            "parameters": {"train": train},
            "work_queue_name": queue,
            "job_variables": {"gpus": devices},
        }
        return str(self.post(f"/deployments/{deployment}/create_flow_run", body)["id"])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask the server; one that is busy says so, and is asked again as Prefect's own client does."""
        answer = self.http.post(path, json=body)
        for _ in range(20):
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
            answer = self.http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def state(self, run: str) -> str:
        return str(self.http.get(f"/flow_runs/{run}").json()["state"]["name"])

    def logs(self, run: str) -> list[str]:
        found = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
        return [line["message"] for line in found]

    def record(self, name: str) -> TrainRecord:
        (path,) = self.settings.trains.glob(f"{name}_*/train.json")
        return TrainRecord.model_validate_json(path.read_bytes())

    def span(self, name: str) -> tuple[float, float]:
        """From the first to the last event of the train's training stage."""
        (path,) = self.settings.trains.glob(f"{name}_*/training/events.jsonl")
        times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
        return min(times), max(times)

    def waiting(self) -> list[str]:
        """Names of the trains that wait for slots, in the order in which they will be served."""
        return [ticket.train.partition("_")[0] for ticket in gpus.waiting_trains(self.settings)]

    def _watch(self) -> None:
        """Note the CUDA_VISIBLE_DEVICES of every training stage, as the system has it, and when slots were given."""
        while self._watching:
            for slot in gpus.slot_states(self.settings):
                if slot.holder is not None:
                    self.given[slot.holder.train.partition("_")[0]] = slot.holder.since
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    variables = process.environ()
                    folder = Path(variables.get("STAGE_JOB_FOLDER", "-"))
                    if folder.name == "training" and folder.is_relative_to(self.settings.trains):
                        train = folder.parent.name.partition("_")[0]
                        self.seen.setdefault(train, set()).add(variables["CUDA_VISIBLE_DEVICES"])
            time.sleep(0.2)

    def close(self) -> None:
        self._watching = False
        self._thread.join()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    root = tmp_path_factory.mktemp("gpu-queue")
    make_tiny_chat_model(root / "tiny", seed=1)
    rows = [{"prompt": f"switch the light {number}", "completion": f"on {number % 7}"} for number in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("TUNELINE_HOME", str(root / "home"))
        patch.setenv("TUNELINE_GPU_LOCKS", str(root / "gpu-locks"))
        patch.setenv("TUNELINE_GPUS", "0,1")
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in own_databases().items():
            patch.setenv(name, value)
        before = dict(os.environ)
        settings = Settings(prefect_port=free_port(), mlflow_port=free_port(), grace_seconds=20)
        services.up(settings)
        made = Host(settings, root)
        try:
            yield made
        finally:
            made.close()
            services.down(settings)
            os.environ.clear()
            os.environ.update(before)


def test_two_trains_on_a_host_with_one_slot_run_one_after_the_other(host: Host) -> None:
    runs = {name: host.start(name, "0") for name in ("one", "two")}
    wait_for(lambda: all(host.state(run) in ENDED for run in runs.values()))
    assert {host.state(run) for run in runs.values()} == {"Completed"}
    first, second = sorted(runs, key=host.span)
    assert host.span(first)[1] < host.span(second)[0]
    assert host.seen == {"one": {"0"}, "two": {"0"}}
    assert any("waiting for 1 GPU: it is the next" in line for line in host.logs(runs[second]))
    assert not any("waiting for" in line for line in host.logs(runs[first]))


def test_four_trains_on_two_slots_run_two_by_two_in_the_order_of_their_work_queues(host: Host) -> None:
    host.seen.clear()
    gpus.take_slots("before them", 2, "high", lambda _: None)
    try:
        runs = {"slow": host.start("slow", "0,1", "low")}
        wait_for(lambda: host.waiting() == ["slow"])
        runs["usual"] = host.start("usual", "0,1")
        wait_for(lambda: host.waiting() == ["usual", "slow"])
        runs["later"] = host.start("later", "0,1")
        wait_for(lambda: host.waiting() == ["usual", "later", "slow"])
        runs["urgent"] = host.start("urgent", "0,1", "high")
        wait_for(lambda: host.waiting() == ["urgent", "usual", "later", "slow"])
        # A waiting train looks at the queue every now and then: its record follows.
        wait_for(lambda: host.record("slow").waiting == "waiting for 1 GPU: 3 trains before it", 60)
    finally:
        gpus.release_slots("before them")
    wait_for(lambda: all(host.state(run) in ENDED for run in runs.values()))
    assert {host.state(run) for run in runs.values()} == {"Completed"}

    spans = {name: host.span(name) for name in runs}
    ended = {name: end for name, (_, end) in spans.items()}
    assert {name: len(devices) for name, devices in host.seen.items()} == dict.fromkeys(runs, 1)
    assert host.seen["urgent"] | host.seen["usual"] == {"0", "1"}  # the two that came first, side by side
    for name in ("later", "slow"):
        (device,) = host.seen[name]
        before = [other for other in runs if host.seen[other] == {device} and spans[other][0] < spans[name][0]]
        assert before  # nobody starts on a slot before the one that had it has ended
        assert all(ended[other] < spans[name][0] for other in before)
    assert max(spans["urgent"][0], spans["usual"][0]) < min(spans["later"][0], spans["slow"][0])
    assert sorted(runs, key=lambda name: host.given[name]) == ["urgent", "usual", "later", "slow"]
    assert host.waiting() == []
    assert [slot.holder for slot in gpus.slot_states(host.settings)] == [None, None]


def test_a_waiting_train_is_cancelled_on_the_page_and_leaves_no_ticket(host: Host) -> None:
    gpus.take_slots("before it", 2, "high", lambda _: None)
    try:
        run = host.start("unwanted", "0,1")
        wait_for(lambda: host.waiting() == ["unwanted"])
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        host.post(f"/flow_runs/{run}/set_state", state)
        wait_for(lambda: host.state(run) == "Cancelled", 60)
        wait_for(lambda: host.waiting() == [], 60)
        assert list(host.settings.gpu_locks.glob("*.ticket")) == []
        wait_for(lambda: host.record("unwanted").status == "cancelled", 60)
    finally:
        gpus.release_slots("before it")

"""A Prefect server, an MLflow server and a worker of an installation of their own, and how a test asks them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.records import TrainRecord
from configs.settings import Settings
from deployments import services
from tests.postgres import own_databases
from tests.tiny_models import make_tiny_chat_model


def free_ports() -> tuple[int, int]:
    """Two different ports: held together, because the system may give one that was let go again."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


class Server:
    """The Prefect server of an installation, asked over HTTP as its page does it."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self.settings, self.root = settings, root
        self.api = f"http://127.0.0.1:{settings.prefect_port}/api"
        self.mlflow = f"http://127.0.0.1:{settings.mlflow_port}"
        # Writers of Prefect's SQLite file wait for one another for up to a minute, which happens with several pools.
        self.http = httpx.Client(base_url=self.api, trust_env=False, timeout=180)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.http.post(path, json=body)
        for _ in range(20):  # as the page and Prefect's clients do: SQLite was locked by somebody else
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
            answer = self.http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def deployment(self, title: str) -> dict[str, Any]:
        answer = self.http.get(f"/deployments/name/{title}")
        answer.raise_for_status()
        return dict(answer.json())

    def start(self, title: str, parameters: dict[str, Any]) -> httpx.Response:
        path = f"/deployments/{self.deployment(title)['id']}/create_flow_run"
        for _ in range(20):
            answer = self.http.post(path, json={"parameters": parameters})
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its SQLite file is held by another request
                break
            time.sleep(0.5)
        return answer

    def state(self, run: str) -> str:
        return str(self.http.get(f"/flow_runs/{run}").json()["state"]["name"])

    def train(self, name: str, **hyper: Any) -> dict[str, Any]:
        given = {"batch_size": 4, "max_seq_length": 128, "learning_rate": 0.01, **hyper}
        return {
            "train": {
                "name": name,
                "base_model": str(self.root / "tiny"),
                "dataset": str(self.root / "rows.jsonl"),
                "method": "sft",
                "hyperparameters": given,
            }
        }

    def retry(self, run: str) -> None:
        """What *Retry* on the page of a run does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        answer = self.post(f"/flow_runs/{run}/set_state", {"state": state, "force": True})
        assert answer["status"] == "ACCEPT", answer

    def told(self, run: str) -> str:
        """What is known of a run that does not do what is waited for."""
        states = self.http.get("/flow_run_states/", params={"flow_run_id": run}).json()
        logs = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_DESC"})
        lines = [f"{state['timestamp']} {state['name']} {state.get('message')}" for state in states]
        return "\n".join(lines + [f"{line['timestamp']} {line['message']}" for line in reversed(logs[:40])])

    def records(self, name: str) -> list[TrainRecord]:
        paths = self.settings.trains.glob(f"{name}_*/train.json")
        return [TrainRecord.model_validate_json(path.read_bytes()) for path in paths]

    def record(self, name: str) -> TrainRecord:
        (found,) = self.records(name)
        return found


@contextmanager
def installation_with_servers(root: Path) -> Iterator[Server]:
    """An installation of its own below `root` with `tuneline up`, a tiny model and 24 rows; all of it ended afterwards.

    The environment of this process names its home as long as the block runs.
    """
    make_tiny_chat_model(root / "tiny", seed=1)
    rows = [{"prompt": f"switch the light {number}", "completion": f"on {number % 7}"} for number in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("TUNELINE_HOME", str(root / "home"))
        patch.setenv("TUNELINE_GPU_LOCKS", str(root / "gpu-locks"))
        patch.setenv("OMP_NUM_THREADS", "1")  # a model this small is only slowed down by a second thread
        for name, value in own_databases().items():
            patch.setenv(name, value)
        before = dict(os.environ)
        prefect, mlflow = free_ports()
        settings = Settings(prefect_port=prefect, mlflow_port=mlflow, grace_seconds=20)
        services.up(settings)
        try:
            yield Server(settings, root)
        finally:
            services.down(settings)
            os.environ.clear()
            os.environ.update(before)


def wait_for(
    condition: Callable[[], object], seconds: float = 90.0, tell: Callable[[], str] = lambda: "waited in vain"
) -> None:
    """Wait until the condition holds, three times as long as a machine with nothing else to do would need."""
    deadline = time.monotonic() + 3 * seconds
    while not condition():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.2)


def processes_naming(text: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE and text in " ".join(p.info["cmdline"] or [])]

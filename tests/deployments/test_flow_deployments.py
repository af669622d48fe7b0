"""Deployments on a real Prefect server: matched, started as the form does it, run by the worker, cancelled."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.records import TrainRecord
from configs.settings import Settings
from deployments import services
from deployments.flow_deployments import TAG, deploy_flows, describe_deployments
from tests.tiny_models import make_tiny_chat_model

WANTED = {
    "customized/sft",
    "complete/sft",
    "deployed/sft",
    "complete/from-model",
    "deployed/from-model",
    "undeploy/endpoint",
    "add-dataset/file",
    "add-base-model/model",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The Prefect server of an installation, asked over HTTP as its page does it."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self.settings, self.root = settings, root
        self.api = f"http://127.0.0.1:{settings.prefect_port}/api"
        self.mlflow = f"http://127.0.0.1:{settings.mlflow_port}"
        self.http = httpx.Client(base_url=self.api, trust_env=False, timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def deployment(self, title: str) -> dict[str, Any]:
        answer = self.http.get(f"/deployments/name/{title}")
        answer.raise_for_status()
        return dict(answer.json())

    def start(self, title: str, parameters: dict[str, Any]) -> httpx.Response:
        return self.http.post(
            f"/deployments/{self.deployment(title)['id']}/create_flow_run", json={"parameters": parameters}
        )

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

    def record(self, name: str) -> TrainRecord:
        (path,) = self.settings.trains.glob(f"{name}_*/train.json")
        return TrainRecord.model_validate_json(path.read_bytes())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("deployments")
    make_tiny_chat_model(root / "tiny", seed=1)
    rows = [{"prompt": f"switch the light {number}", "completion": f"on {number % 7}"} for number in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("TUNELINE_HOME", str(root / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")  # a model this small is only slowed down by a second thread
        before = dict(os.environ)
        settings = Settings(prefect_port=free_port(), mlflow_port=free_port(), grace_seconds=20)
        services.up(settings)
        try:
            yield Server(settings, root)
        finally:
            services.down(settings)
            os.environ.clear()
            os.environ.update(before)


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def processes_naming(text: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE and text in " ".join(p.info["cmdline"] or [])]


def test_up_has_put_every_deployment_there_with_its_enforced_form(server: Server) -> None:
    forms = {item.title: item.form for item in describe_deployments(server.settings)}
    assert set(forms) == WANTED
    for title, form in forms.items():
        found = server.deployment(title)
        assert found["parameter_openapi_schema"] == form
        assert found["enforce_parameter_schema"] is True
        assert found["work_pool_name"] == "tuneline"
        assert found["job_variables"]["env"]["TUNELINE_HOME"] == str(server.settings.root)


def test_deploying_again_changes_nothing(server: Server) -> None:
    assert {item.change for item in deploy_flows(server.settings, server.api)} == {"unchanged"}


def test_what_differs_is_mended_what_is_gone_removed_and_what_others_made_kept(server: Server) -> None:
    ours = server.deployment("customized/sft")
    schedule = {"schedule": {"cron": "0 3 * * 0", "timezone": "UTC"}, "active": False}
    server.post(f"/deployments/{ours['id']}/schedules", [schedule])  # type: ignore[arg-type]
    server.http.patch(f"/deployments/{ours['id']}", json={"description": "something else"}).raise_for_status()
    for name, tags in {"of-a-deleted-method": [TAG], "of-somebody-else": ["theirs"]}.items():
        server.post("/deployments/", {"name": name, "flow_id": ours["flow_id"], "tags": tags})

    changes = {item.deployment: item.change for item in deploy_flows(server.settings, server.api)}

    assert {title: change for title, change in changes.items() if change != "unchanged"} == {
        "customized/sft": "updated",
        "customized/of-a-deleted-method": "removed",
    }
    mended = server.deployment("customized/sft")
    assert mended["description"] == ours["description"]
    assert [item["schedule"]["cron"] for item in mended["schedules"]] == ["0 3 * * 0"]
    assert server.deployment("customized/of-somebody-else")["tags"] == ["theirs"]


def test_an_impossible_value_is_refused_with_its_path_and_nothing_runs(server: Server) -> None:
    before = server.post("/flow_runs/count", {})
    answer = server.start("customized/sft", server.train("refused", learning_rate=5))
    assert answer.status_code == 409
    assert "'train.hyperparameters.learning_rate'" in answer.text
    assert "5 is greater than the maximum of 1" in answer.text
    assert server.post("/flow_runs/count", {}) == before


def test_a_train_from_the_form_runs_in_the_worker_and_is_recorded_in_the_home(server: Server) -> None:
    run = server.start("customized/sft", server.train("lights", max_steps=6)).json()["id"]
    wait_for(lambda: server.state(run) in ("Completed", "Failed", "Crashed"))
    assert server.state(run) == "Completed"

    record = server.record("lights")
    assert (record.status, record.flow_run_id, record.config.through) == ("completed", run, "customized")
    assert record.origins["hyperparameters.learning_rate"] == "form"
    assert record.origins["hyperparameters.lora_rank"] == "default"
    answer = httpx.get(f"{server.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": record.run_id}, trust_env=False)
    assert answer.json()["run"]["info"]["status"] == "FINISHED"
    of_run = {"flow_run_id": {"any_": [run]}}
    artifacts = server.post("/artifacts/filter", {"artifacts": of_run})
    (progress,) = [item["data"] for item in artifacts if item["key"] == "training-progress"]
    assert float(progress) == 100
    logs = [line["message"] for line in server.post("/logs/filter", {"logs": of_run})]
    assert any("training: 6/6" in line or "training: training" in line for line in logs)


def test_a_cancelled_train_saves_a_checkpoint_and_leaves_no_process(server: Server) -> None:
    parameters = server.train("endless", max_steps=1_000_000, checkpoint_steps=1_000_000)
    run = server.start("customized/sft", parameters).json()["id"]

    def training() -> list[Path]:
        found = server.settings.trains.glob("endless_*/training/events.jsonl")
        return [path.parent for path in found if '"metrics"' in path.read_text()]

    wait_for(training)
    (folder,) = training()
    assert len(processes_naming(str(folder))) == 2  # the stage and its supervisor

    server.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    wait_for(lambda: not processes_naming(str(folder)), 30)
    wait_for(lambda: server.state(run) == "Cancelled", 30)
    assert list(folder.glob("checkpoints/checkpoint-*/complete"))
    assert server.record("endless").status == "cancelled"


def test_a_dataset_is_added_from_the_page(server: Server) -> None:
    run = server.start("add-dataset/file", {"file": str(server.root / "rows.jsonl"), "name": "from-page"}).json()["id"]
    wait_for(lambda: server.state(run) in ("Completed", "Failed", "Crashed"))
    assert server.state(run) == "Completed"
    assert list((server.settings.datasets / "from-page").glob("*/rows.jsonl"))

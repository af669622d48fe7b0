"""Deployments on a real Prefect server: matched, started as the form does it, run by the worker, cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.flow_deployments import TAG, deploy_flows, describe_deployments
from deployments.work_pools import base_job_template
from methods.registry import load_methods
from tests.deployments.server import Server, installation_with_servers, processes_naming, wait_for

WANTED = {
    "resume/train",
    "sweep/train",
    "resume/after-crash",
    "complete/from-model",
    "deployed/from-model",
    "undeploy/endpoint",
    "add-dataset/file",
    "add-base-model/model",
    "add-method/folder",
    "new-method/template",
    "check-method/name",
    "delete-method/name",
}
WANTED |= {f"{through}/{method.name}" for method in load_methods().values() for through in method.lifecycle}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("deployments")) as made:
        yield made


@pytest.fixture(scope="module")
def lights(server: Server) -> str:
    """The flow run of a train that was started from the form and has ended."""
    run = str(server.start("customized/sft", server.train("lights", max_steps=6)).json()["id"])
    wait_for(lambda: server.state(run) in ("Completed", "Failed", "Crashed"))
    return run


def test_up_has_put_every_deployment_there_with_its_enforced_form(server: Server) -> None:
    forms = {item.title: item.form for item in describe_deployments(server.settings)}
    assert set(forms) == WANTED > {"customized/sft", "complete/sft", "deployed/sft"}
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


def test_a_train_from_the_form_runs_in_the_worker_and_is_recorded_in_the_home(server: Server, lights: str) -> None:
    run = lights
    assert server.state(run) == "Completed", server.told(run)

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


def test_retry_of_a_completed_train_returns_its_model_without_training_again(server: Server, lights: str) -> None:
    before = server.record("lights")
    log = server.settings.trains / before.id / "training" / "train.log"
    trained, models = log.read_bytes(), list(server.settings.models.iterdir())

    server.retry(lights)

    wait_for(lambda: server.record("lights").attempts == 2, 180, lambda: server.told(lights))
    wait_for(lambda: server.state(lights) in ("Completed", "Failed", "Crashed"))
    assert server.state(lights) == "Completed"
    after = server.record("lights")  # and there is one only
    assert (after.status, after.model, after.flow_run_id) == ("completed", before.model, lights)
    assert log.read_bytes() == trained
    assert list(server.settings.models.iterdir()) == models


def test_a_copied_run_is_recorded_as_a_copy_with_what_was_changed(server: Server, lights: str) -> None:
    original = server.record("lights")
    # What the page's *Copy to new run* sends: the parameters, and the tags of the run as well.
    tags = server.http.get(f"/flow_runs/{lights}").json()["tags"]
    body = {"parameters": server.train("copied", max_steps=2, learning_rate=0.02), "tags": tags}
    deployment = server.deployment("customized/sft")["id"]
    second = server.post(f"/deployments/{deployment}/create_flow_run", body)["id"]
    wait_for(lambda: server.state(second) in ("Completed", "Failed", "Crashed"))

    copy = server.record("copied")
    assert copy.origins["hyperparameters.learning_rate"] == "form"
    assert copy.origins["hyperparameters.max_seq_length"] == f"copied from {original.id}"
    assert copy.origins["hyperparameters.lora_rank"] == "default"
    tags = server.http.get(f"/flow_runs/{second}").json()["tags"]
    assert [tag for tag in tags if tag.startswith("train:")] == [f"train:{copy.id}"]


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
    assert server.state(run) == "Completed", server.told(run)
    assert list((server.settings.datasets / "from-page").glob("*/rows.jsonl"))


def test_each_pool_has_deployments_of_its_own_and_keeps_what_was_set_on_its_page(server: Server) -> None:
    changes = {item.deployment: item.change for item in deploy_flows(server.settings, server.api, "gpu-a100")}
    deployed = {title: change for title, change in changes.items() if not title.startswith("automation ")}
    assert deployed == {f"{title}@gpu-a100": "created" for title in WANTED}
    ours = server.deployment("customized/sft@gpu-a100")
    assert ours["work_pool_name"] == "gpu-a100"
    assert ours["job_variables"] == {}  # the home of another host is in its worker's environment
    queues = server.post("/work_pools/gpu-a100/queues/filter", {})
    assert {queue["name"]: queue["priority"] for queue in queues} == {"high": 1, "default": 2, "low": 3}

    template = server.http.get("/work_pools/gpu-a100").json()["base_job_template"]
    template["variables"]["properties"]["environment"]["default"] = "ft"
    template["job_configuration"]["command"] = "python -m prefect.engine"
    server.http.patch("/work_pools/gpu-a100", json={"base_job_template": template}).raise_for_status()
    variables = {"environment": "other"}
    server.http.patch(f"/deployments/{ours['id']}", json={"job_variables": variables}).raise_for_status()
    stray = {"name": "gone@gpu-a100", "flow_id": ours["flow_id"], "tags": [TAG], "work_pool_name": "gpu-a100"}
    server.post("/deployments/", stray)

    assert {item.change for item in deploy_flows(server.settings, server.api)} == {"unchanged"}
    changes = {item.deployment: item.change for item in deploy_flows(server.settings, server.api, "gpu-a100")}

    assert {title for title, change in changes.items() if change != "unchanged"} == {"customized/gone@gpu-a100"}
    assert server.deployment("customized/sft@gpu-a100")["job_variables"] == variables
    mended = server.http.get("/work_pools/gpu-a100").json()["base_job_template"]
    assert mended == base_job_template({"environment": "ft"})

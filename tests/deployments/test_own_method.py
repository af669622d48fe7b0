"""A method of under forty lines, written outside of the repository, from its folder to its deletion."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from configs.settings import PROJECT_ROOT
from tests.deployments.server import Server, installation_with_servers
from tests.deployments.test_method_deployments import run_to_its_end

pytestmark = pytest.mark.operations

MANIFEST = """\
name: plain-sgd
description: LoRA with the plainest of training loops.
types: [chat]
lifecycle: [customized]
hyperparameters: {unused: [tuning, num_generations], defaults: {learning_rate: 0.02, max_steps: 12}}
parameters:
  momentum: {type: number, minimum: 0, exclusiveMaximum: 1, default: 0.5, title: Momentum, description: Of the steps.}
stages:
  training: {file: training.py, environment: host}
"""
TRAINING = """\
import json
from pathlib import Path

import torch
from methods import contract
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

def main(job):
    p, base = job.parameters, job.inputs["base_model"]
    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(r=p["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    rows = [json.loads(line)["messages"] for line in Path(job.inputs["train_rows"]).read_text().splitlines()]
    optimizer = torch.optim.SGD(model.parameters(), p["learning_rate"], momentum=p["momentum"])
    for step in range(1, p["max_steps"] + 1):
        text = tokenizer.apply_chat_template(rows[step % 2], tokenize=False)
        batch = tokenizer(text, return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        job.metrics(step, loss=loss.item())
        if job.cancelled:
            raise contract.Cancelled
    model.save_pretrained(job.output)
    return {"model": str(job.output), "adapter": True, "steps": step, "loss": loss.item()}

contract.run(main)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("own")) as made:
        yield made


def tuneline(*arguments: str) -> str:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curve(server: Server, run_id: str) -> list[float]:
    history = MlflowClient(server.mlflow).get_metric_history(run_id, "loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def test_a_method_of_one_file_is_added_trains_is_copied_compared_and_deleted(server: Server) -> None:
    assert MANIFEST.count("\n") + TRAINING.count("\n") < 40
    folder = server.root / "plain"
    folder.mkdir()
    assert PROJECT_ROOT not in folder.parents
    (folder / "method.yaml").write_text(MANIFEST)
    (folder / "training.py").write_text(TRAINING)
    assert run_to_its_end(server, "add-method/folder", {"folder": str(folder)}) == "Completed"

    # A deployment with a form of its own, which the server enforces.
    train: dict[str, Any] = server.train("plain")["train"] | {"method": "plain-sgd"}
    fields = server.deployment("customized/plain-sgd")["parameter_openapi_schema"]["properties"]["train"]["properties"]
    momentum, hyper = fields["method_params"]["properties"]["momentum"], fields["hyperparameters"]["properties"]
    assert (momentum["title"], momentum["default"]) == ("Momentum", 0.5)
    assert (hyper["max_steps"]["default"], "tuning" in hyper) == (12, False)
    refused = server.start("customized/plain-sgd", {"train": train | {"method_params": {"momentum": 1}}})
    assert refused.status_code == httpx.codes.CONFLICT
    assert "momentum" in refused.text

    # It trains, with the values of the form and its own defaults.
    train["hyperparameters"] = {"lora_rank": 4}
    given = train | {"method_params": {"momentum": 0.9}}
    assert run_to_its_end(server, "customized/plain-sgd", {"train": given}) == "Completed"
    first = server.record("plain")
    assert first.origins["method_params.momentum"] == "form"
    assert first.origins["hyperparameters.max_steps"] == "method plain-sgd"
    losses = curve(server, first.run_id)
    assert len(losses) == first.outcome["steps"] == 12
    assert losses[-1] < 0.9 * losses[1]

    # It is copied with one change, and compared.
    tuneline("trains", "copy", first.id, "--set", "name=plainer", "--set", "momentum=0", "--run")
    second = server.record("plainer")
    assert second.status == "completed"
    compared = json.loads(tuneline("trains", "compare", first.id, second.id, "--json"))
    assert compared["parameters"] == {"method_params.momentum": [0.9, 0.0]}
    assert compared["figures"]["loss"][0] != compared["figures"]["loss"][1]
    assert curve(server, second.run_id)[0] == losses[0]

    # It is deleted, and what it has made stays readable.
    assert run_to_its_end(server, "delete-method/name", {"name": "plain-sgd"}) == "Completed"
    assert server.http.get("/deployments/name/customized/plain-sgd").status_code == httpx.codes.NOT_FOUND
    assert not (server.settings.methods / "plain-sgd").exists()
    assert folder.is_dir()
    shown = tuneline("trains", "show", first.id)
    assert "momentum" in shown
    assert first.id in shown
    models = json.loads(tuneline("models", "list", "--json"))["mine"]
    assert {model["method"] for model in models} == {"plain-sgd"}
    assert Path(models[0]["path"]).is_dir()

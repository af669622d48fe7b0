"""The method of docs/methods.md: its files and commands taken from the page, from their folder to their deletion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT
from tests.deployments.server import Server, installation_with_servers
from tests.deployments.test_method_deployments import run_to_its_end

pytestmark = pytest.mark.operations

PAGE = (PROJECT_ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(focal/[\w.]+)`\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
ADD, COPY, DELETE, CUSTOM01, CUSTOM02 = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("own")) as made:
        yield made


def run(server: Server, commands: str) -> str:
    """What the commands print, run in a folder outside of the repository; each of them has to succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxc", commands],
        cwd=server.root,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def curve(server: Server, record: TrainRecord) -> list[float]:
    history = MlflowClient(server.mlflow).get_metric_history(record.run_id, "loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def test_the_method_of_the_page_is_added_trains_is_copied_compared_and_deleted(server: Server) -> None:
    assert sorted(FILES) == ["focal/focal.py", "focal/method.yaml"]
    assert sum(text.count("\n") for text in FILES.values()) < 40
    assert PROJECT_ROOT not in server.root.parents
    (server.root / "focal").mkdir()
    for name, text in FILES.items():
        (server.root / name).write_text(text, encoding="utf-8")
    told = run(server, ADD)
    assert "customized/focal" in told
    checked = [line for line in told.splitlines() if line.startswith("✓ focal: ")]
    names = [line.removeprefix("✓ focal: ").rpartition(" (")[0] for line in checked]
    assert names == ["tiny model", "training", "inference-customized", "cancelling", "resuming", "a failing job"]

    # A deployment with a form of its own, which the server enforces.
    train: dict[str, Any] = server.train("first-focal")["train"] | {"method": "focal"}
    fields = server.deployment("customized/focal")["parameter_openapi_schema"]["properties"]["train"]["properties"]
    gamma, hyper = fields["method_params"]["properties"]["gamma"], fields["hyperparameters"]["properties"]
    assert (gamma["title"], gamma["default"], gamma["minimum"], gamma["maximum"]) == ("Gamma", 2, 1, 5)
    assert hyper["tuning"]["enum"] == ["lora"]
    assert hyper["learning_rate"]["default"] == 0.001
    assert "num_generations" not in hyper
    refused = server.start("customized/focal", {"train": train | {"method_params": {"gamma": 0.5}}})
    assert refused.status_code == httpx.codes.CONFLICT
    assert "gamma" in refused.text

    # It trains with the values of the form, and its own defaults.
    train["hyperparameters"] = {"max_steps": 12, "batch_size": 4, "max_seq_length": 128}
    assert run_to_its_end(server, "customized/focal", {"train": train | {"method_params": {"gamma": 3}}}) == "Completed"
    first = server.record("first-focal")
    assert first.config.method_params == {"gamma": 3.0}
    assert first.origins["method_params.gamma"] == "form"
    assert first.origins["hyperparameters.learning_rate"] == "method focal"
    losses = curve(server, first)
    assert len(losses) == first.outcome["steps"] == 12
    assert losses[-1] < 0.9 * losses[0]

    # It is copied with one change, and compared. Where every token is hard, gamma is near to making no difference.
    told = run(server, COPY)
    second = server.record("plain-focal")
    assert second.status == "completed"
    assert re.search(r"method_params\.gamma +3(\.0)? +1(\.0)?\b", told), told
    compared = json.loads(run(server, f"tuneline trains compare {first.id} {second.id} --json"))
    assert compared["parameters"] == {"method_params.gamma": [3.0, 1.0]}
    assert curve(server, second)[0] > losses[0]

    # It is deleted, and what it has made stays readable.
    told = run(server, DELETE)
    assert server.http.get("/deployments/name/customized/focal").status_code == httpx.codes.NOT_FOUND
    assert server.http.get("/deployments/name/customized/sft").status_code == httpx.codes.OK
    assert not (server.settings.methods / "focal").exists()
    assert (server.root / "focal").is_dir()
    assert first.id in told
    assert "gamma" in told
    assert "step 12/12" in told
    assert curve(server, first) == losses
    models = json.loads(run(server, "tuneline models list --json"))["mine"]
    assert {model["method"] for model in models} == {"focal"}
    assert Path(models[0]["path"]).is_dir()


@pytest.mark.parametrize(("template", "commands"), [("my-trainer", CUSTOM01), ("my-command", CUSTOM02)])
def test_a_copy_of_a_template_is_added_and_passes_its_check(server: Server, template: str, commands: str) -> None:
    told = run(server, commands)
    assert f"✓ {template}: resuming" in told
    assert "✗" not in told
    assert server.deployment(f"complete/{template}")
    assert run_to_its_end(server, "delete-method/name", {"name": template}) == "Completed"

"""A model with code of its own, from pytorch_model.bin to an endpoint: convert, consent, train, save, ask, serve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.command_line import printed, read_json, tuneline
from tests.own_code_models import FILES, make_packed_model

pytestmark = pytest.mark.lifecycle

HYPER: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 0.01,
    "checkpoint_steps": 3,
    "max_seq_length": 128,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model converted and its code allowed, and rows to train on."""
    work = tmp_path_factory.mktemp("own-code")
    make_packed_model(work / "pickled")
    rows = [{"prompt": f"light {number} {'ab'[number % 2]}", "completion": f"on {number % 3}"} for number in range(40)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(work, "models", "convert", "pickled", "--to", "packed")
    digest = read_json(command(work, "models", "code", "packed", "--json"))["digest"]
    run(work, "models", "allow-code", "packed", "--yes", digest)
    return work


@pytest.fixture(scope="module")
def trained(work: Path) -> Iterator[str]:
    """The name of the complete model of a LoRA on the model's own module."""
    train(work, "lora", "complete", lora_targets=["W_pack"])
    yield "lora"
    command(work, "undeploy", "lora")


def command(work: Path, *arguments: str) -> Any:
    return tuneline(*arguments, home=work / "home", cwd=work, seconds=1200)


def run(work: Path, *arguments: str) -> str:
    return printed(command(work, *arguments))


def train(work: Path, name: str, through: str, **hyper: Any) -> None:
    content = {
        "name": name,
        "base_model": "packed",
        "dataset": "rows.jsonl",
        "max_new_tokens": 8,
        "hyperparameters": {**HYPER, **hyper},
    }
    (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    run(work, "train", f"{name}.yaml", "--through", through)


def models_of(work: Path, line: str) -> dict[str, dict[str, Any]]:
    listed = read_json(command(work, "models", "list", "--json"))["mine"]
    return {model["stage"]: model for model in listed if model["line"] == line}


def test_a_lora_on_its_own_modules_is_trained_saved_and_asked(work: Path, trained: str) -> None:
    models = models_of(work, trained)
    adapter = json.loads((Path(models["customized"]["path"]) / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"W_pack"}
    digest = read_json(command(work, "models", "code", "packed", "--json"))["digest"]
    for stage in ("customized", "complete"):
        path = Path(models[stage]["path"])
        assert {file.name for file in path.glob("*.py")} == set(FILES)
        assert read_json(command(work, "models", "code", models[stage]["name"], "--json"))["digest"] == digest
        assert "<reserved_106>" in (path / "chat_template.jinja").read_text()
    settings = json.loads((Path(models["complete"]["path"]) / "generation_config.json").read_text())
    assert settings["use_cache"] is False  # its code cannot take the library's cache
    answers = {run(work, "infer", models[stage]["name"], "light 3 b") for stage in models}
    assert len(answers) == 1  # merged, it answers as the adapter on its base does
    assert models["complete"]["verification"]["merged_to_base"] > 0


def test_the_record_and_mlflow_name_the_code(work: Path, trained: str) -> None:
    record = json.loads(next((work / "home" / "trains").glob(f"{trained}_*/train.json")).read_text())
    digest = read_json(command(work, "models", "code", "packed", "--json"))["digest"]
    assert record["remote_code"]["digest"] == digest
    assert set(record["remote_code"]["files"]) == set(FILES)
    from mlflow.tracking import MlflowClient

    from configs.settings import Settings
    from deployments.databases import mlflow_database_uri

    client = MlflowClient(mlflow_database_uri(Settings(home=work / "home")))
    assert client.get_run(record["run_id"]).data.tags["tuneline.remote_code"].startswith(digest)


def test_it_is_served_with_the_allowed_code_and_no_other(work: Path, trained: str) -> None:
    import httpx

    run(work, "deploy", trained, "--endpoint", trained)
    endpoint = json.loads((work / "home" / "endpoints" / trained / "endpoint.json").read_text())
    (deployment,) = [each for each in endpoint["deployments"] if each["model"] == endpoint["current"]]
    other = work / "other"
    make_packed_model(other)
    mark = work / "was-run"
    with (other / "configuration_packed.py").open("a") as file:
        file.write(f"\nopen({str(mark)!r}, 'w')\n")
    server = f"http://127.0.0.1:{deployment['port']}"
    said = httpx.post(f"{server}/load_model", json={"model": str(other)}, timeout=60).text
    assert "loads no other" in said
    assert not mark.exists()


def test_full_training_keeps_the_code_as_well(work: Path) -> None:
    train(work, "full", "complete", tuning="full", learning_rate=0.001)
    (model,) = models_of(work, "full").values()
    assert {file.name for file in Path(model["path"]).glob("*.py")} == set(FILES)
    run(work, "infer", model["name"], "light 3 b")


def test_a_revoked_code_stops_training_asking_and_serving(work: Path, trained: str) -> None:
    digest = read_json(command(work, "models", "code", "packed", "--json"))["digest"]
    run(work, "models", "revoke-code", digest)
    try:
        for arguments in (["infer", trained, "light"], ["train", f"{trained}.yaml"], ["deploy", trained]):
            done = command(work, *arguments)
            assert done.returncode != 0
            assert "not allowed" in done.stderr + done.stdout
    finally:
        run(work, "models", "allow-code", "packed", "--yes", digest)

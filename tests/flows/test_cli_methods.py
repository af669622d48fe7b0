"""`tuneline methods`, `infer` and `profiles` through the real program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.records import ModelRecord
from configs.settings import PROJECT_ROOT
from methods.registry import find_method
from tasks.files import write_record
from tests.own_methods import install_method
from tests.tasks.test_method_checks import write_method


def tuneline(*arguments: str | Path, code: int = 0) -> str:
    """What the program prints (errors too), which is to end with `code`."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_method_is_begun_added_shown_and_deleted(home: Path, tmp_path: Path) -> None:
    assert "tuneline methods add" in tuneline("methods", "new", "mine", "--from", "sft", "--folder", tmp_path / "mine")
    manifest = tmp_path / "mine" / "method.yaml"
    own = "parameters:\n  beta: {type: number, minimum: 0, default: 0.1, description: Strength of it.}\n"
    common = "hyperparameters: {unused: [num_generations], defaults: {learning_rate: 1.0e-6}}\n"
    text = re.sub(r"hyperparameters:\n(  .*\n)+", common, manifest.read_text())
    manifest.write_text(text.replace("parameters: {}\n", own))
    assert "mine is added" in tuneline("methods", "add", tmp_path / "mine")
    listed = json.loads(tuneline("methods", "list", "--json"))
    assert "mine" in {method["name"] for method in listed}
    shown = tuneline("methods", "show", "mine")
    assert "trains on    conversations (chat), conversations with tool calls (chat_tools)" in shown
    assert "| `beta` | – | `0.1` | a number ≥ 0 | – | Strength of it. |" in shown
    assert "| `learning_rate` | `LEARNING_RATE`, `LR`, `学习率` | `1e-06` |" in shown
    assert "num_generations" not in shown
    manifest.write_text(manifest.read_text().replace("minimum: 0", "minimum: x"))
    line = manifest.read_text().partition("  beta:")[0].count("\n") + 1
    assert f"method.yaml:{line}: this is no JSON schema" in tuneline("methods", "add", tmp_path / "mine", code=2)
    assert "its past trains stay" in tuneline("methods", "delete", "mine")
    assert "no such training method" in tuneline("methods", "show", "mine", code=2)


def test_check_prints_a_table_and_fails_if_anything_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GRACE_SECONDS", "2")
    write_method()
    told = tuneline("methods", "check", "mine")
    assert "✓ mine: resuming" in told
    assert "✗" not in told
    write_method("training", ', "adapter": True', "")
    told = tuneline("methods", "check", "mine", code=1)
    assert "✗ mine: training" in told
    assert "does not say whether it has left an adapter" in " ".join(told.split())
    results = json.loads(tuneline("methods", "check", "mine", "--json", code=1))
    assert [result["check"] for result in results if result["ok"] is False] == ["training"]
    assert "name one method, or --all" in tuneline("methods", "check", code=2)
    assert find_method("mine").folder.is_dir()


ANSWERING = """
import json
from pathlib import Path
from methods import contract

def main(job):
    if "evaluation_rows" in job.inputs:
        return {"figures": {"accuracy": 0.75, "margin": 1.5}}
    lines = []
    for line in Path(job.inputs["requests"]).read_text().splitlines():
        asked = json.loads(line)
        if "texts" in asked:
            lines.append({"embeddings": [[float(len(text)), 1.0] for text in asked["texts"]]})
        elif "answers" in asked:
            lines.append({"scores": [len(answer) / 2 for answer in asked["answers"]]})
        else:
            picture = job.output / "made.png"
            picture.write_text(f"{asked['caption']} {asked['seed']}")
            lines.append({"image": str(picture)})
    (job.output / "predictions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    return {}

if __name__ == "__main__":
    contract.run(main)
"""


def own_model(home: Path, **changes: object) -> None:
    """A model `lights` of a method that answers without a model."""
    stages = {"inference-complete": {"file": "answering.py", "environment": "host"}}
    folder = install_method(**{"lifecycle": ["deployed"], "deployment_targets": ["vllm"], "stages": stages, **changes})
    (folder / "answering.py").write_text(ANSWERING)
    path = home / "models" / "lights"
    given = {"name": "lights", "stage": "complete", "line": "lights", "base": "b", "method": "mine"}
    write_record(path / "tuneline.json", ModelRecord.model_validate({**given, "path": path, "base_path": path}))


def test_a_model_is_asked_for_what_its_method_makes(home: Path, tmp_path: Path) -> None:
    own_model(home, types=["embedding"])
    told = tuneline("infer", "lights", "on", "--text", "of", "--text", "lit up")
    assert "on\n  2 numbers: 2.0000 1.0000 ..." in told
    assert "on    of      1.0000" in told
    assert json.loads(tuneline("infer", "lights", "on", "--json"))["embeddings"] == [[2.0, 1.0]]
    assert "no meaning for a model of this kind" in tuneline("infer", "lights", "on", "--answer", "x", code=2)

    own_model(home, datasets=["preference"], evaluation=["preference"])
    told = tuneline("infer", "lights", "on?", "--answer", "on", "--answer", "it is on")
    assert [line.split()[0] for line in told.splitlines()] == ["Score", "4.0000", "1.0000"]
    assert "scores answers" in tuneline("infer", "lights", "on?", code=2)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"prompt": "on?", "chosen": "on", "rejected": "off"}) + "\n")
    told = tuneline("evaluate", "lights", "--dataset", rows)
    assert ["accuracy", "(%)", "75"] in [line.split() for line in told.splitlines()]
    assert "takes preference pairs" in tuneline("evaluate", "lights", "--dataset", _chat_rows(tmp_path), code=2)

    own_model(home, types=["image-generation"])
    picture = tmp_path / "boat.png"
    assert tuneline("infer", "lights", "a boat", "--seed", "7", "--output", picture) == f"{picture}\n"
    assert picture.read_text() == "a boat 7"
    assert "one of the method mine" in tuneline("infer", "lights", "a boat", "--method", "sft", code=2)


def _chat_rows(folder: Path) -> Path:
    (folder / "chat.jsonl").write_text(json.dumps({"prompt": "on?", "completion": "on"}) + "\n")
    return folder / "chat.jsonl"


def test_parameters_are_saved_as_a_profile_and_start_a_train(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").touch()
    file = tmp_path / "train.yaml"
    file.write_text(f"name: t\nbase_model: {base}\ndataset: {_chat_rows(tmp_path)}\nlora_rank: 4\nepochs: 2\n")
    told = tuneline("profiles", "save", "small", file, "--set", "seed=7", "--description", "for a try")
    assert "left out: name, base_model, dataset" in " ".join(told.split())
    assert [line.split()[:2] for line in told.splitlines() if "lora_rank" in line] == [["lora_rank", "4"]]
    assert json.loads(tuneline("profiles", "list", "--json"))["small"]["description"] == "for a try"
    assert json.loads(tuneline("profiles", "show", "small", "--json"))["hyperparameters"]["seed"] == 7
    told = tuneline("train", file, "--profile", "small", "--set", "epochs=3", "--dry-run")
    lines = [line.split() for line in told.splitlines()]
    assert ["seed", "7", "profile", "small"] in lines
    assert ["epochs", "3", "command", "line"] in lines
    assert "of this name already" in tuneline("profiles", "save", "small", file, code=2)
    assert "is deleted" in tuneline("profiles", "delete", "small")
    assert "there is no such profile" in tuneline("train", file, "--profile", "small", "--dry-run", code=2)

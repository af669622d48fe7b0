"""The files that ship, and the public datasets as they are: what the documentation shows can be typed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from configs.resolve import PRESETS, ResolvedTrain, resolve_train
from configs.settings import PROJECT_ROOT
from configs.train import Hyperparameters
from flows import cli, cli_trains
from methods.manifest import Method
from methods.registry import find_method, load_methods
from tasks import checking
from tasks.checking import check_train
from tests.flows.command_line import printed, read_json, tuneline
from tests.tiny_models import make_tiny_chat_model

EXAMPLES = sorted((PROJECT_ROOT / "configs" / "examples").glob("*.yaml"))
READY = [name for name, method in load_methods().items() if method.train]
PRESET_FILES = sorted(PRESETS.glob("*.yaml"))
SHARED_DATA = Path(os.environ.get("TUNELINE_SHARED_DATA", PROJECT_ROOT.parent / "shared" / "data"))

# As the documentation spells them; the tiny model has a token for nearly each byte.
DOCUMENTED = """
TRAIN_NAME: {name}
MODEL_PATH: {model}
DATASET_PATH: {dataset}
{columns}
LORA_RANK: 4
loraAlpha: 8
LOAD_IN_4BIT: false
MAX_SEQ_LENGTH: 512
MAX_INPUT_LENGTH: 400
MAX_CONTENT_LENGTH: 400
MAX_SAMPLES: -1
NUM_GENERATIONS: 2
MAX_GRAD_NORM: 1.0
EPOCHS: 1
MAX_STEPS: 3
BATCH_SIZE: 2
GRAD_ACCUM_STEPS: 1
LEARNING_RATE: 5e-5
WARMUP_STEPS: 1
WARMUP_RATIO: 0.1
OUTPUT_DIR: /nowhere
"""


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs the public dataset {name}: set TUNELINE_SHARED_DATA to its folder")
    return path


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_example_resolves_without_a_warning_of_its_own_making(file: Path) -> None:
    resolved = resolve_train(file)
    assert resolved.config.name
    given = {name for name, origin in resolved.origins.items() if origin.startswith("file ")}
    assert {"name", "base_model", "dataset"} <= given
    assert [warning for warning in resolved.warnings if "no effect" in warning or "overrides" in warning] == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_what_it_trains_and_how_to_run_it(file: Path) -> None:
    comment = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert comment[0].startswith("# Trains: ")
    assert any(line.startswith("# Memory: ") for line in comment)
    command = next(line for line in comment if line.startswith("# Run: "))
    assert f"tuneline train configs/examples/{file.name}" in command


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_rows_of_an_example_are_all_usable(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rows are the same whether or not the method's own environment was made.
    monkeypatch.setattr(Method, "stage_python", lambda method, stage: Path(sys.executable))
    # The reward model of ppo is one that another example trains.
    monkeypatch.setattr(checking, "fixed_models", lambda config: config)
    overrides = [f"dataset={shared('gsm8k_train_2000.jsonl')}"] if file.stem == "gsm8k_lora" else []
    reports = check_train(resolve_train(file, overrides).config)
    assert {name: report.rows_refused for name, report in reports.items()} == dict.fromkeys(reports, 0)
    assert reports["dataset"].rows_kept > 30
    assert all(report.rows_kept >= 8 for report in reports.values())
    assert not home.exists()


@pytest.mark.parametrize("name", READY)
def test_a_ready_method_is_trained_by_its_name(
    name: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ResolvedTrain] = []
    monkeypatch.setattr(cli_trains, "start", lambda resolved, queue: started.append(resolved))
    monkeypatch.chdir(tmp_path)
    cli.train(Path(name))
    (resolved,) = started
    assert (resolved.config.method, resolved.config.name) == (name, name)
    assert resolved.warnings == []
    reports = check_train(resolved.config)
    assert set(reports) == {"dataset", "validation_dataset", "evaluation_dataset"}
    assert all(report.rows_kept > 30 and report.rows_refused == 0 for report in reports.values())


@pytest.mark.parametrize("name", READY)
def test_a_ready_method_says_what_it_trains_and_how_to_run_it(name: str) -> None:
    lines = (find_method(name).folder / "method.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Trains: ")
    assert any(line.startswith("# Memory: ") for line in lines)
    assert any(line.startswith(f"# Run:    tuneline train {name}") for line in lines)


def test_sft_demo_is_the_train_of_the_demo() -> None:
    demo = resolve_train(PROJECT_ROOT / "configs" / "examples" / "demo.yaml").config
    ready = resolve_train(overrides=["method=sft-demo"]).config
    own = {"name", "description", "method", "through"}
    assert ready.model_dump(exclude=own) == demo.model_dump(exclude=own)


@pytest.mark.parametrize("file", PRESET_FILES, ids=lambda path: path.stem)
def test_preset_reaches_the_configuration(file: Path) -> None:
    overrides = ["name=t", "base_model=smollm2-135m-instruct", "dataset=rows"]
    resolved = resolve_train(None, overrides, preset=file.stem)
    values = yaml.safe_load(file.read_text(encoding="utf-8"))["values"]
    assert values
    for name, value in values.items():
        if name == "method":
            assert (resolved.config.method, resolved.origins[name]) == (value, f"preset {file.stem}")
            continue
        common = name in Hyperparameters.model_fields
        given = resolved.config.hyperparameters.model_dump() if common else resolved.config.method_params
        assert given[name] == value
        place = "hyperparameters" if common else "method_params"
        assert resolved.origins[f"{place}.{name}"] == f"preset {file.stem}"
    assert [warning for warning in resolved.warnings if "no effect" in warning or "overrides" in warning] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    make_tiny_chat_model(root / "tiny", seed=1)
    return root


@pytest.mark.lifecycle
@pytest.mark.parametrize(
    ("name", "file", "rows", "columns"),
    [
        ("gsm8k", "gsm8k_train_2000.jsonl", 2000, "PromptInputColumn: question\nPromptOutputColumn: answer"),
        ("alpaca", "alpaca_en_demo.json", 999, ""),
    ],
)
def test_public_dataset_is_trained_on_as_it_is(place: Path, name: str, file: str, rows: int, columns: str) -> None:
    dataset = shared(file)
    text = DOCUMENTED.format(name=name, model=place / "tiny", dataset=dataset, columns=columns)
    (place / f"{name}.yaml").write_text(text)
    home = place / "home"

    done = tuneline("train", f"{name}.yaml", home=home, cwd=place, seconds=170)
    assert f"{rows} of {rows}" in printed(done)
    assert "OUTPUT_DIR" in done.stdout  # told to have no effect
    assert "max_steps = 3" in done.stdout  # told to win over epochs

    record = read_json(tuneline("trains", "show", name, "--json", home=home, cwd=place))
    assert record["status"] == "completed"
    assert record["outcome"]["steps"] == 3
    stored = read_json(tuneline("datasets", "show", record["dataset"], "--json", home=home, cwd=place))
    assert stored["rows"] == rows
    model = home / "models" / record["model"]
    assert (model / "adapter_model.safetensors").is_file()
    assert json.loads((model / "adapter_config.json").read_text())["r"] == 4

"""Copies and reproductions: the configuration that was really read, and how agreement is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.records import TrainRecord
from configs.resolve import COPIED_FROM, copied_trains, resolve_train
from configs.settings import PROJECT_ROOT
from configs.train import TrainConfig
from methods import contract
from methods.registry import load_methods
from tasks import tracking
from tasks.evaluation import kept_evaluation
from tasks.files import write_record
from tasks.reproducing import compare_reproduction, pinned_config, reproduction_config
from tasks.tracking import train_yaml
from tasks.trains import save_record, train_folder
from tests.evaluations import evaluation_of

EXAMPLES = sorted((PROJECT_ROOT / "configs" / "examples").glob("*.yaml"))


def record(train_id: str, config: dict[str, Any] | None = None, **fields: Any) -> TrainRecord:
    given = {"name": "lights", "base_model": "base", "dataset": "rows.jsonl", **(config or {})}
    values = {"run_id": "0" * 32, "status": "completed", **fields}
    return TrainRecord(id=train_id, config=TrainConfig.model_validate(given), **values)


def copied(config: TrainConfig, folder: Path) -> Any:
    """What `tuneline trains copy` writes of a train with this configuration, read as `tuneline train` does."""
    resolved = resolve_train(copied=pinned_config(record("lights_1", config.model_dump())), copied_from="lights_1")
    file = folder / "copy.yaml"
    file.write_text(f"{COPIED_FROM}: lights_1\n{train_yaml(resolved.config)}", encoding="utf-8")
    return resolve_train(file)


@pytest.mark.parametrize(
    "example", [path for path in EXAMPLES if "base_model" in path.read_text()], ids=lambda p: p.stem
)
def test_a_copy_of_every_example_is_the_same_train(example: Path, tmp_path: Path) -> None:
    config = resolve_train(example).config
    again = copied(config, tmp_path)
    assert again.config == config
    assert copied_trains(again.origins.values()) == ["lights_1"]


@pytest.mark.parametrize(
    "config",
    [
        {"hyperparameters": {"tuning": "full", "learning_rate": 1e-7, "epochs": 0.5}},
        {"hyperparameters": {"load_in_4bit": True, "lora_alpha": 3, "lora_targets": ["q_proj", "v_proj"]}},
        {"hyperparameters": {"lr_scheduler": "constant", "warmup_steps": 900, "max_steps": 10}, "through": "complete"},
        {"through": "deployed", "endpoint": "lamps", "alerts": [{"to": "gone", "on": ["failed"]}]},
        {"description": "007: yes #3\n'é' 灯", "prompt_column": "1", "completion_column": "no"},
        {"evaluation_by": "lang", "stop_words": "zh", "gpus": 0, "resume_after_crash": 3},
    ],
)
def test_a_copy_refuses_nothing_that_the_original_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    given = record("lights_1", config).config
    assert copied(given, tmp_path).config == given


def test_a_copy_of_every_method_with_its_defaults_is_the_same_train(tmp_path: Path) -> None:
    for method in load_methods().values():
        overrides = ["name=x", "base_model=b", "dataset=d", f"method={method.name}"]
        try:
            config = resolve_train(overrides=overrides).config
        except UserError:  # it needs a parameter of its own, whose values differ by method
            continue
        assert copied(config, tmp_path).config == config, method.name


def test_a_copy_reads_the_versions_that_the_original_has_read() -> None:
    config = {"base_model": "line@champion", "evaluation_dataset": "test.jsonl"}
    versions = {"dataset": "rows@0123", "evaluation_dataset": "test@4567", "base": "line_x_s_ab12"}
    found = pinned_config(record("one", config, **versions))
    assert (found["dataset"], found["evaluation_dataset"]) == ("rows@0123", "test@4567")
    assert found["validation_dataset"] is None
    assert found["base_model"] == "line_x_s_ab12"
    assert pinned_config(record("one", base="base"))["base_model"] == "base"


def test_what_a_file_says_it_was_copied_from_must_be_an_id(tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text("name: x\nbase_model: b\ndataset: d\ncopied_from: [1]\n")
    with pytest.raises(UserError, match=r"copy.yaml:4: "):
        resolve_train(file)


def test_only_a_completed_train_is_reproduced_and_no_further_than_to_its_model(home: Path) -> None:
    config = {"through": "deployed", "endpoint": "lamps", "alerts": [{"to": "ops", "on": ["failed"]}]}
    scores = {"tuned": {"f1": 80.0}}
    found = reproduction_config(record("one", config, dataset="rows@0123", evaluation=scores))
    assert (found.config.through, found.config.endpoint, found.config.alerts) == (None, None, [])
    assert found.config.dataset == "rows@0123"
    assert found.origins["endpoint"] == "reproduction"
    assert found.origins["base_model"] == "copied from one"
    with pytest.raises(UserError, match="trains resume one"):
        reproduction_config(record("one", status="failed"))
    with pytest.raises(UserError, match="neither curves nor scores"):
        reproduction_config(record("one"))


# --- agreement ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_id(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The MLflow run of the train `two`; making a store takes seconds, so there is one for all."""
    root = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELINE_HOME", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        yield tracking.start_run("two", "train", {})


@pytest.fixture
def pair(run_id: str, home: Path) -> tuple[TrainRecord, TrainRecord]:
    evaluation = {"tuned": {"f1": 80.0}}
    one = record("one", outcome={"steps": 3, "loss": 1.5, "seconds": 10.0}, evaluation=evaluation, code_version="v1")
    outcome = {"steps": 3, "loss": 1.5, "seconds": 20.0}
    two = record("two", outcome=outcome, evaluation=evaluation, code_version="v1", run_id=run_id)
    for each in (one, two):
        save_record(each)
        write_curves(each, [2.0, 1.5, 1.0])
        write_record(kept_evaluation(train_folder(each.id), "tuned"), evaluation_of([("a", "b", "c"), ("d", "e", "e")]))
    return one, two


def write_curves(train: TrainRecord, losses: list[float]) -> None:
    path = train_folder(train.id) / "training" / contract.EVENTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    speed = 100.0 if train.id == "one" else 50.0
    lines = [
        {"type": "metrics", "time": 1.0, "step": step, "values": {"loss": loss, "tokens_per_second": speed}}
        for step, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_numbers_are_the_same_whatever_the_machine_was_doing(pair: tuple[TrainRecord, TrainRecord]) -> None:
    found = compare_reproduction(*pair)
    assert found.agreement == "same"
    assert list(found.curves) == ["loss"]
    assert (found.curves["loss"].points, found.curves["loss"].step) == (3, None)
    assert (found.answers, found.answers_same) == (2, 2)
    assert "seconds" not in found.figures
    tags = tracking.mlflow_client().get_run(pair[1].run_id).data.tags
    assert (tags["tuneline.reproduces"], tags["tuneline.reproduction"]) == ("one", "same")
    assert (train_folder("two") / "reproduction.json").exists()


@pytest.mark.parametrize(
    ("losses", "agreement", "step"),
    [
        ([2.0, 1.5000001, 1.0], "close", 2),
        ([2.0, 1.5, 1.1], "different", 3),
        ([2.0, 1.5], "different", 3),
        ([2.0, 1.5, 1.0, 0.9], "different", 4),
        ([2.0, float("nan"), 1.0], "different", 2),
    ],
)
def test_the_first_step_that_differs_is_told(
    pair: tuple[TrainRecord, TrainRecord], losses: list[float], agreement: str, step: int
) -> None:
    write_curves(pair[1], losses)
    found = compare_reproduction(*pair)
    assert (found.agreement, found.curves["loss"].step) == (agreement, step)


def test_a_score_or_a_version_that_differs_is_told(pair: tuple[TrainRecord, TrainRecord]) -> None:
    one, two = pair
    two = two.model_copy(update={"evaluation": {"tuned": {"f1": 70.0}}, "code_version": "v2"})
    write_record(kept_evaluation(train_folder("two"), "tuned"), evaluation_of([("a", "b", "c"), ("d", "e", "x")]))
    found = compare_reproduction(one, two)
    assert found.agreement == "different"
    assert found.figures["tuned f1"] == (80, 70)
    assert found.versions == {"code": ["v1", "v2"]}
    assert (found.answers, found.answers_same) == (2, 1)


def test_other_answers_are_not_the_same_even_if_every_figure_is(pair: tuple[TrainRecord, TrainRecord]) -> None:
    write_record(kept_evaluation(train_folder("two"), "tuned"), evaluation_of([("a", "b", "x"), ("d", "e", "e")]))
    assert compare_reproduction(*pair).agreement == "close"

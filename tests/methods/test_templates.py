"""The templates custom01 and custom02 keep the stage contract as they are, before anybody edits a copy."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.train import Hyperparameters
from methods import contract
from methods.registry import find_method
from tasks.stages import StageCancelled, StageJob
from tests.methods.stage_jobs import curve, run_method, signal_running, wait_for

# The second starts a program a step of a train: minutes in all.
TEMPLATES = ("custom01", pytest.param("custom02", marks=pytest.mark.methods))


def job_of(
    method: str, folder: Path, base: Path, rows: Path, *, resume: Path | None = None, **changes: Any
) -> StageJob:
    """A training job with the parameters that the method shows, as the system makes it."""
    found = find_method(method)
    own = {name: changes.pop(name) for name in found.parameters if name in changes}
    common = {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "max_seq_length": 128, "checkpoint_steps": 4}
    values = Hyperparameters(**(common | changes)).model_dump(mode="json")
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    parameters = {name: values[name] for name in found.hyperparameter_names} | found.parameter_defaults | own
    return StageJob(
        stage="training",
        parameters={**parameters, "max_new_tokens": 8},
        inputs={"base_model": str(base), "train_rows": str(rows), "validation_rows": None},
        output=folder / "output",
        resume_from=resume,
        seed=values["seed"],
    )


def train(method: str, folder: Path, base: Path, rows: Path, **changes: Any) -> dict[int, list[float]]:
    run_method(folder, job_of(method, folder, base, rows, **changes), method=method)
    return curve(folder, "loss")


@pytest.mark.parametrize("method", TEMPLATES)
def test_a_template_trains_and_a_resumed_train_is_the_same(
    method: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    whole = tmp_path / "whole"
    losses = train(method, whole, tiny_model, tiny_rows)
    assert list(losses) == list(range(1, 9))
    assert losses[8][0] < losses[1][0]
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoints" / "checkpoint-4", resumed / "checkpoint-4")
    again = train(method, resumed, tiny_model, tiny_rows, resume=resumed / "checkpoint-4")
    assert again == {step: value for step, value in losses.items() if step > 4}
    one, other = (load_file(folder / "output" / "adapter_model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize("method", TEMPLATES)
def test_a_cancelled_template_leaves_a_whole_checkpoint_and_no_process(
    method: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    from tests.flows.tiny_trains import processes_naming

    folder = tmp_path / "job"
    job = job_of(method, folder, tiny_model, tiny_rows, max_steps=100_000, checkpoint_steps=100_000)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_method, folder, job, 30, method)
        assert wait_for(lambda: len(curve(folder, "loss")) >= 2, 60)
        assert signal_running(folder)
        with pytest.raises(StageCancelled):
            running.result(60)
    assert len(contract.complete_checkpoints(folder / "checkpoints")) == 1
    assert processes_naming(str(folder)) == []


# Each parameter with a value that must change the curve of losses.
CHANGES: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 2},
    "learning_rate": {"learning_rate": 0.001},
    "lora_rank": {"lora_rank": 2},
    "lora_alpha": {"lora_alpha": 2},
    "max_seq_length": {"max_seq_length": 40},
    "max_samples": {"max_samples": 9},
    "seed": {"seed": 7},
}


@pytest.mark.methods
@pytest.mark.parametrize("name", CHANGES)
def test_each_option_of_the_command_changes_the_training(
    name: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, plain: dict[int, list[float]]
) -> None:
    assert train("custom02", tmp_path / "job", tiny_model, tiny_rows, **({"max_steps": 3} | CHANGES[name])) != plain


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    return train("custom02", tmp_path_factory.mktemp("plain") / "job", tiny_model, tiny_rows, max_steps=3)


def test_every_parameter_of_the_command_is_in_a_table() -> None:
    others = {"max_steps", "checkpoint_steps", "keep_checkpoints"}
    assert set(CHANGES) | others == set(find_method("custom02").hyperparameter_names)


@pytest.mark.methods
def test_old_checkpoints_of_the_command_are_removed(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    train("custom02", folder, tiny_model, tiny_rows, max_steps=7, checkpoint_steps=2, keep_checkpoints=2)
    kept = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_label_smoothing_reaches_the_loss(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    plain = train("custom01", tmp_path / "plain", tiny_model, tiny_rows, max_steps=1)
    smoothed = train("custom01", tmp_path / "smoothed", tiny_model, tiny_rows, max_steps=1, label_smoothing=0.5)
    assert smoothed != plain

"""LoRA on MLX (its CPU backend here), in the environment that the method names."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.train import Hyperparameters
from methods import contract
from methods.registry import find_method
from tasks.stages import StageCancelled, StageJob, run_stage
from tests.method_environments import method_python
from tests.methods.stage_jobs import curve, signal_running, wait_for

pytestmark = pytest.mark.methods


@pytest.fixture(scope="module")
def python() -> Path:
    return method_python("mlx_demo", "mlx-demo")


def job_of(folder: Path, base: Path, rows: Path, *, resume: Path | None = None, **changes: Any) -> StageJob:
    """A training job of the method; `num_layers` is the method's own, the rest are common hyper-parameters."""
    own = {"num_layers": changes.pop("num_layers", -1)}
    common = {"max_steps": 12, "batch_size": 4, "learning_rate": 0.02, "max_seq_length": 128, "checkpoint_steps": 5}
    values = Hyperparameters(**(common | changes)).model_dump(mode="json")
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    return StageJob(
        stage="training",
        parameters={**values, **own, "max_new_tokens": 8},
        inputs={"base_model": str(base), "train_rows": str(rows), "validation_rows": str(rows)},
        output=folder / "output",
        resume_from=resume,
        seed=values["seed"],
    )


def train(python: Path, folder: Path, job: StageJob) -> dict[str, Any]:
    file = find_method("mlx-demo").stage_file("training")
    return run_stage(folder, job, python, file, 30, lambda events: None)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "output" / "adapter_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


@pytest.fixture(scope="module")
def trained(
    python: Path, tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mlx") / "job"
    return folder, train(python, folder, job_of(folder, tiny_model, tiny_rows, lora_dropout=0.1))


def test_the_loss_is_more_than_halved(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    losses = curve(folder, "loss")
    before, after = losses[1][0], curve(folder, "eval_loss")[12][0]
    print(f"loss before {before:.3f}, after {after:.3f}")
    assert after < before / 2
    assert list(losses) == list(range(1, 13))
    assert (result["steps"], result["adapter"]) == (12, True)
    for name in ("learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second", "memory_gib"):
        assert len(curve(folder, name)) == 12, name
    log = (folder / contract.LOG_FILE).read_text()
    assert "\x1b" not in log
    assert "step 12/12" in log


def test_torch_gives_the_loss_that_mlx_has_measured(
    trained: tuple[Path, dict[str, Any]], tiny_model: Path, tiny_rows: Path
) -> None:
    """The adapter in peft's form is the one that MLX has trained: the same mean loss over the same answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from methods.toolkit.tokenizing import Limits, tokenise_rows

    folder, _ = trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows, _ = tokenise_rows(tokenizer, tiny_rows, Limits(128, None, None, "drop"), -1)
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert total / tokens == pytest.approx(curve(folder, "eval_loss")[12][0], rel=1e-3)


def test_a_resumed_train_is_the_uninterrupted_one(
    trained: tuple[Path, dict[str, Any]], python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    whole, result = trained
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoints" / "checkpoint-5", resumed / "checkpoint-5")
    again = job_of(resumed, tiny_model, tiny_rows, resume=resumed / "checkpoint-5", lora_dropout=0.1)
    second = train(python, resumed, again)
    assert list(curve(resumed, "loss")) == list(range(6, 13))
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens"):
        assert curve(resumed, name) == {step: value for step, value in curve(whole, name).items() if step > 5}, name
    assert same_weights(whole, resumed)
    assert second["loss"] == pytest.approx(result["loss"])


def test_batch_one_accumulated_is_the_whole_batch(
    python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.01}
    for name, batch, accumulated in (("one", 4, 1), ("other", 1, 4)):
        folder = tmp_path / name
        train(
            python,
            folder,
            job_of(folder, tiny_model, tiny_rows, batch_size=batch, grad_accum_steps=accumulated, **changes),
        )
    one, other = curve(tmp_path / "one", "loss"), curve(tmp_path / "other", "loss")
    assert one.keys() == other.keys()
    for step in one:
        assert other[step] == pytest.approx(one[step], rel=1e-3)


def test_a_cancelled_train_saves_a_checkpoint(python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    job = job_of(folder, tiny_model, tiny_rows, max_steps=100_000, checkpoint_steps=100_000)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, python, folder, job)
        assert wait_for(lambda: len(curve(folder, "loss")) >= 2, 60)
        assert signal_running(folder)
        with pytest.raises(StageCancelled):
            running.result(60)
    (checkpoint,) = contract.complete_checkpoints(folder / "checkpoints")
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 2


# Each parameter with a value that must change the curve of losses (or, for the last ones, what is said below).
CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 0.001},
    "lora_rank": {"lora_rank": 2},
    "lora_alpha": {"lora_alpha": 2},
    "lora_dropout": {"lora_dropout": 0.5},
    "lora_targets": {"lora_targets": ["q_proj"]},
    "num_layers": {"num_layers": 1},
    "load_in_4bit": {"load_in_4bit": True},
    "max_seq_length": {"max_seq_length": 40, "over_length": "truncate"},
    "max_input_length": {"max_input_length": 30, "over_length": "truncate"},
    "max_content_length": {"max_content_length": 4, "over_length": "truncate"},
    "over_length": {"max_seq_length": 40, "over_length": "drop"},
    "max_samples": {"max_samples": 9},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "batch_size": {"batch_size": 2},
    "grad_accum_steps": {"grad_accum_steps": 2},
    "lr_scheduler": {"lr_scheduler": "constant"},
    "lr_decay_ratio": {"lr_decay_ratio": 0.5},
    "warmup_steps": {"warmup_steps": 3},
    "warmup_ratio": {"warmup_ratio": 0.5},
    "weight_decay": {"weight_decay": 5.0},
    "optimizer": {"optimizer": "sgd"},
    "group_by_length": {"group_by_length": False},
    "seed": {"seed": 7},
    "dtype": {"dtype": "bfloat16"},
}
SEEN_OTHERWISE = {  # by the tests at the end
    "max_steps", "epochs", "checkpoint_steps", "keep_checkpoints", "evaluation_steps", "logging_steps",
    "gradient_checkpointing",
    # by the toolkit's rows and tokenizer: test_tokenizing.py, test_chat_template.py
    "train_on", "turns", "thinking", "chat_template_kwargs",
}  # fmt: skip


def test_every_parameter_of_the_form_is_in_a_table() -> None:
    method = find_method("mlx-demo")
    assert set(CHANGES) | SEEN_OTHERWISE == {*method.hyperparameter_names, *method.parameters}


@pytest.mark.parametrize("name", CHANGES)
def test_each_parameter_changes_the_training(
    name: str, python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path, plain: dict[int, list[float]]
) -> None:
    folder = tmp_path / "job"
    train(python, folder, job_of(folder, tiny_model, tiny_rows, **({"max_steps": 4} | CHANGES[name])))
    assert curve(folder, "loss") != plain


@pytest.fixture(scope="module")
def plain(
    python: Path, tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[float]]:
    folder = tmp_path_factory.mktemp("plain") / "job"
    train(python, folder, job_of(folder, tiny_model, tiny_rows, max_steps=4))
    return curve(folder, "loss")


def test_intervals_and_epochs_are_kept_to(python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    changes: dict[str, Any] = {
        "max_steps": None, "epochs": 2, "checkpoint_steps": 2, "keep_checkpoints": 3, "evaluation_steps": 4,
        "logging_steps": 5,
    }  # fmt: skip
    result = train(python, folder, job_of(folder, tiny_model, tiny_rows, **changes))
    assert result["steps"] == 11  # 2 × 21 rows in batches of 4
    assert list(curve(folder, "eval_loss")) == [4, 8, 11]
    assert list(curve(folder, "loss")) == [1, 5, 10]
    kept = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert kept == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]


def test_checkpointed_gradients_take_less_memory_and_are_the_same(
    python: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    for name, switched in (("plain", False), ("saving", True)):
        folder = tmp_path / name
        changes: dict[str, Any] = {"max_steps": 2, "batch_size": 16, "gradient_checkpointing": switched}
        train(python, folder, job_of(folder, tiny_model, tiny_rows, **changes))
    one, other = tmp_path / "plain", tmp_path / "saving"
    assert curve(other, "loss")[2] == pytest.approx(curve(one, "loss")[2], rel=1e-4)
    assert curve(other, "memory_gib")[2] < curve(one, "memory_gib")[2]

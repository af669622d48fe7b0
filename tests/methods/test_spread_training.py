"""A training in two processes is that in one with twice the batch; it is cancelled, resumed and fails as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from configs.train import TrainConfig
from methods import contract
from methods.registry import find_method
from tasks.launching import launcher
from tasks.stages import StageCancelled, StageFailed, run_stage
from tests.methods.stage_jobs import curve, processes_of, signal_running, training_job, wait_for

pytestmark = pytest.mark.methods

# 20 rows: no step of an epoch is short, where accelerate would fill up with rows from the start.
HYPER = {"epochs": 2, "learning_rate": 5e-3, "checkpoint_steps": 3, "keep_checkpoints": 9, "evaluation_steps": 5}
# Not eval_loss: the library takes the mean of the batches' means, which depends on what is in a batch.
CURVES = ("loss", "learning_rate", "grad_norm", "tokens", "token_accuracy", "epoch")


@pytest.fixture(scope="module")
def rows(tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread") / "rows.jsonl"
    path.write_text("".join(tiny_rows.read_text().splitlines(keepends=True)[:20]))
    return path


def train(
    folder: Path, model: Path, rows: Path, distribution: str = "none", resume: Path | None = None, **hyper: Any
) -> dict[str, Any]:
    """Train on a CPU as a train with this distribution does, in two processes unless it is `none`."""
    folder.mkdir(parents=True, exist_ok=True)
    job = training_job(folder, model, rows, resume=resume, **{"validation": rows, **HYPER, **hyper})
    given = {"name": "t", "base_model": "b", "dataset": "d", "distribution": distribution}
    config = TrainConfig.model_validate(given | {"processes": 1 if distribution == "none" else 2})
    method = find_method("sft")
    how = launcher(config, folder, on_gpus=False)
    python, file = method.stage_python("training"), method.stage_file("training")
    return run_stage(folder, job, python, file, 60, lambda events: None, how)


def same(one: Path, two: Path, since: int = 0) -> None:
    for name in CURVES:
        expected, found = curve(one, name), curve(two, name)
        assert set(expected) >= set(found)
        for step, values in expected.items():
            if step > since:
                assert found[step] == pytest.approx(values, rel=2e-4, abs=1e-6), (name, step)


def weights(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "output").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(
    tiny_model: Path, rows: Path, tmp_path: Path, distribution: str, tuning: str
) -> None:
    hyper = {"tuning": tuning, "grad_accum_steps": 1}
    alone = train(tmp_path / "one", tiny_model, rows, batch_size=4, **hyper)
    spread = train(tmp_path / "two", tiny_model, rows, distribution, batch_size=2, **hyper)
    same(tmp_path / "one", tmp_path / "two")
    assert spread["steps"] == alone["steps"] == 10
    assert spread["adapter"] is (tuning == "lora")
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name
    # One of the two speaks: every point once, every sample once, one log.
    assert all(len(values) == 1 for values in curve(tmp_path / "two", "loss").values())
    samples = (tmp_path / "two" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == len((tmp_path / "one" / "samples.jsonl").read_text().splitlines())
    assert (tmp_path / "two" / "train.log").read_text().count("step 1/10") == 1


def test_two_processes_resume_as_one(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", tiny_model, rows, "ddp", batch_size=2)
    start = tmp_path / "whole" / "checkpoints" / "checkpoint-6"
    train(tmp_path / "resumed", tiny_model, rows, "ddp", resume=start, batch_size=2)
    assert min(curve(tmp_path / "resumed", "loss")) == 7
    same(tmp_path / "whole", tmp_path / "resumed", since=6)


@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes_keep_the_same_best_step(tiny_model: Path, rows: Path, tmp_path: Path, distribution: str) -> None:
    contrary = tmp_path / "contrary.jsonl"
    held_back = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in held_back:  # once the answers are learned, the loss of others rises
        row["messages"][-1]["content"] = "the room is dark"
    contrary.write_text("".join(json.dumps(row) + "\n" for row in held_back))
    hyper: dict[str, Any] = {"batch_size": 2, "evaluation_steps": 2, "checkpoint_steps": 99, "keep_checkpoints": 1}
    hyper |= {"max_steps": 24, "keep_best": "eval_loss", "learning_rate": 2e-2, "lr_scheduler": "constant"}
    hyper |= {"validation": contrary, "num_generations": 1}
    result = train(tmp_path / "two", tiny_model, rows, distribution, **hyper, early_stopping_patience=2)
    points = {step: values[0] for step, values in curve(tmp_path / "two", "eval_loss").items()}
    best = min(points, key=lambda step: points[step])
    assert result["best_step"] == best
    assert max(points) == result["steps"] == best + 4 < 24
    train(tmp_path / "short", tiny_model, rows, distribution, **{**hyper, "max_steps": best, "keep_best": None})
    expected, found = weights(tmp_path / "short"), weights(tmp_path / "two")
    assert all((found[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())


def test_two_processes_are_cancelled_together(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, tmp_path, tiny_model, rows, "ddp", epochs=9999, batch_size=2)
        assert wait_for(lambda: running.done() or any(step > 2 for step in _steps(tmp_path)), 120)
        assert signal_running(tmp_path)
        with pytest.raises(StageCancelled):
            running.result(120)
    assert json.loads((tmp_path / contract.RESULT_FILE).read_text()) == {"status": "cancelled"}
    newest = contract.complete_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == f"checkpoint-{max(_steps(tmp_path))}"
    assert processes_of(tmp_path) == []


def _steps(folder: Path) -> set[int]:
    return set(curve(folder, "loss")) if (folder / contract.EVENTS_FILE).exists() else set()


def test_two_processes_fail_with_the_message_of_one(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(StageFailed, match="KeyError"):
        train(tmp_path / "job", tiny_model, tmp_path / "rows.jsonl", "ddp")
    assert processes_of(tmp_path / "job") == []

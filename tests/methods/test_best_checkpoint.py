"""A train that overfits keeps its best checkpoint and ends early, the same if it is killed in between; NaN ends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods import contract
from methods.sft import training as sft
from methods.toolkit import best_metric, training
from tasks.stages import EventTail, StageKilled
from tests.methods.parameter_effects import poison
from tests.methods.stage_jobs import curve, open_job, run_method, training_job
from tests.methods.training_bench import Bench, interrupt_at, kill_stage, losses, result_of, weights

# 21 rows in batches of 4: six steps an epoch. The validation rows answer the same prompts differently.
OVERFITTED: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "lora_dropout": 0.1,
    "lr_scheduler": "constant",
    "evaluation_steps": 2,
    "num_generations": 1,
    "checkpoint_steps": 5,
    "keep_checkpoints": 1,
    "keep_best": "eval_loss",
}
STOPPED = OVERFITTED | {"early_stopping_patience": 3}


@pytest.fixture(scope="module")
def contrary_rows(tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose loss falls while a model learns the form of `tiny_rows`, and rises when it learns their answers."""
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = "the " + row["messages"][-1]["content"].split()[0] + " is dark"
    path = tmp_path_factory.mktemp("contrary") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def bench(tiny_model: Path, tiny_rows: Path, contrary_rows: Path, tmp_path: Path) -> Bench:
    return Bench("sft", tiny_model, tiny_rows, tmp_path, contrary_rows)


@pytest.fixture(scope="module")
def overfitted(
    tiny_model: Path, tiny_rows: Path, contrary_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Job folders of trains whose validation loss rises: to the end with LoRA and full, and stopped early."""
    bench = Bench("sft", tiny_model, tiny_rows, tmp_path_factory.mktemp("overfitted"), contrary_rows)
    given = {"lora": OVERFITTED, "full": OVERFITTED | {"tuning": "full"}, "stopped": STOPPED}
    return {name: bench.train(validation=True, **hyper) for name, hyper in given.items()}


def lowest(folder: Path) -> int:
    points = {step: values[-1] for step, values in curve(folder, "eval_loss").items()}
    return min(points, key=lambda step: points[step])


def whole(folder: Path) -> list[int]:
    return [
        int(path.name.removeprefix("checkpoint-")) for path in contract.complete_checkpoints(folder / "checkpoints")
    ]


def warnings_of(folder: Path) -> list[str]:
    events = EventTail(folder / contract.EVENTS_FILE).read()
    return [event["text"] for event in events if event["type"] == "warning"]


def same_weights(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_product_is_the_best_checkpoint_and_not_the_last(overfitted: dict[str, Path], tuning: str) -> None:
    folder = overfitted[tuning]
    best, last = lowest(folder), 30
    assert best < last - 6
    assert whole(folder) == [best, last]  # although only one is to be kept
    result = result_of(folder)
    points = curve(folder, "eval_loss")
    assert (result["steps"], result["best_step"]) == (last, best)
    assert (result["best_eval_loss"], result["last_eval_loss"]) == (points[best][0], points[last][0])
    assert "stopped" not in result
    file = "adapter_model.safetensors" if tuning == "lora" else "model.safetensors"
    for step, equal in ((best, True), (last, False)):
        kept = load_file(folder / "checkpoints" / f"checkpoint-{step}" / file)
        saved = load_file(folder / "output" / file)
        assert kept.keys() == saved.keys()
        assert all(torch.equal(kept[name], saved[name]) for name in kept) is equal


def test_keeping_the_best_changes_nothing_in_the_training(bench: Bench, overfitted: dict[str, Path]) -> None:
    plain = bench.train(validation=True, **{**OVERFITTED, "keep_best": None})
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(plain, name) == curve(overfitted["lora"], name)
    assert not same_weights(plain, overfitted["lora"])
    assert result_of(plain).keys() == {"model", "adapter", "steps", "seconds", "loss"}


def test_a_train_stops_after_as_many_evaluations_in_vain(overfitted: dict[str, Path]) -> None:
    folder, best = overfitted["stopped"], lowest(overfitted["lora"])
    points = curve(overfitted["lora"], "eval_loss")
    assert sorted(curve(folder, "eval_loss")) == list(range(2, best + 7, 2))
    assert max(curve(folder, "loss")) == best + 6
    assert result_of(folder)["stopped"] == (
        f"stopped early at step {best + 6}: eval_loss has not improved in 3 evaluations; its best is "
        f"{points[best][0]:.6g}, of step {best}"
    )
    assert same_weights(folder, overfitted["lora"])


@pytest.mark.parametrize("since_best", [pytest.param(-1, marks=pytest.mark.methods), 3])
def test_a_killed_train_keeps_the_same_step_and_stops_at_the_same(
    since_best: int, tiny_model: Path, tiny_rows: Path, contrary_rows: Path, tmp_path: Path, overfitted: dict[str, Path]
) -> None:
    step = lowest(overfitted["lora"]) + since_best
    killer = interrupt_at(tmp_path, step, lambda: kill_stage(tmp_path))
    given: dict[str, Any] = {"validation": contrary_rows, **STOPPED}
    with pytest.raises(StageKilled):
        run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, **given))
    killer.join()
    newest = contract.complete_checkpoints(tmp_path / "checkpoints")[-1]
    result = run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, resume=newest, **given))
    expected = result_of(overfitted["stopped"])
    assert {name: result[name] for name in expected if name not in ("model", "seconds")} == {
        name: value for name, value in expected.items() if name not in ("model", "seconds")
    }
    assert same_weights(tmp_path, overfitted["stopped"])
    assert whole(tmp_path) == whole(overfitted["stopped"])


def test_a_train_killed_after_it_had_stopped_takes_no_further_step(
    bench: Bench, contrary_rows: Path, overfitted: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(overfitted["stopped"] / "checkpoints", folder / "checkpoints")
    end = contract.complete_checkpoints(folder / "checkpoints")[-1]
    sft.main(
        open_job(folder, training_job(folder, bench.base, bench.rows, validation=contrary_rows, resume=end, **STOPPED))
    )
    assert curve(folder, "loss") == {}
    assert same_weights(folder, overfitted["stopped"])


def test_a_train_that_is_stopped_early_without_keep_best_saves_its_last_step(bench: Bench) -> None:
    folder = bench.train(validation=True, **{**STOPPED, "keep_best": None})
    last = whole(folder)[-1]
    assert result_of(folder)["steps"] == last < 30
    assert "best_step" not in result_of(folder)
    kept = load_file(folder / "checkpoints" / f"checkpoint-{last}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(folder).items())


def test_the_end_of_a_broken_off_epoch_is_evaluated_before_its_checkpoint(bench: Bench) -> None:
    folder = bench.train(validation=True, **{**OVERFITTED, "evaluation_steps": None, "max_steps": 9})
    state = json.loads((folder / "checkpoints" / "checkpoint-9" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [6, 9]
    assert sorted(curve(folder, "eval_loss")) == [6, 9]


def test_a_metric_that_is_higher_where_it_is_better(bench: Bench) -> None:
    folder = bench.train(validation=True, **{**OVERFITTED, "keep_best": "eval_token_accuracy"})
    points = {step: values[0] for step, values in curve(folder, "eval_token_accuracy").items()}
    assert result_of(folder)["best_step"] == max(points, key=lambda step: (points[step], -step))


def test_a_metric_that_is_not_evaluated_is_refused_with_those_that_are(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match=r"eval_rouge.*one of eval_loss, eval_token_accuracy"):
        bench.train(validation=True, **{**OVERFITTED, "keep_best": "eval_rouge"})


@pytest.mark.parametrize("method", ["sft", pytest.param("peft", marks=pytest.mark.methods)])
def test_a_job_that_only_saves_makes_the_product_of_its_checkpoint(
    method: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    bench = Bench(method, tiny_model, tiny_rows, tmp_path)
    own = {"technique": "p_tuning", "encoder_dropout": 0.1} if method == "peft" else {}
    given: dict[str, Any] = {
        "batch_size": 4,
        "learning_rate": 1e-2,
        "keep_checkpoints": 9,
        "checkpoint_steps": 2,
        **own,
    }
    whole_train, short = bench.train(max_steps=6, **given), bench.train(max_steps=4, lr_scheduler="constant", **given)
    for folder, step in ((whole_train, 2), (short, 4)):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        target = tmp_path / f"of-{folder.name}"
        job = bench.stage_job(target, resume=checkpoint, max_steps=6, **given)
        job = job.model_copy(update={"inputs": {**job.inputs, training.SAVE_ONLY: True}})
        result = bench._main(open_job(target, job))
        assert (result["steps"], result["adapter"]) == (step, True)
        assert curve(target, "loss") == {}
        kept = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights(target).items())
        assert {path.name for path in (folder / "output").iterdir()} == {path.name for path in job.output.iterdir()}
    assert same_weights(tmp_path / f"of-{short.name}", short)


# --- the rule -------------------------------------------------------------------------------------------------------


def stands(values: list[float], metric: str = "eval_loss", threshold: float = 0.0) -> tuple[int, int]:
    """Best step and evaluations in vain."""
    found = best_metric.standing({step: {metric: value} for step, value in enumerate(values, 1)}, metric, threshold)
    assert found is not None
    return found.best_step, found.in_vain


def test_the_best_is_the_earliest_of_equal_ones_and_a_small_gain_is_no_improvement() -> None:
    nan = float("nan")
    assert stands([3, 2, 2, 4]) == (2, 2)
    assert stands([3, 2, 2, 4], "eval_reward") == (4, 0)
    assert stands([3, 2.9, 2.8, 2.7], threshold=0.5) == (4, 3)
    assert stands([3, 2.9, 2.4], threshold=0.45) == (3, 0)
    assert stands([nan, 3, nan, 4]) == (2, 2)
    assert best_metric.standing({1: {"eval_loss": nan}}, "eval_loss") is None
    assert best_metric.standing({0: {"eval_reward": 1.0}}, "eval_reward") is None


def test_every_metric_that_a_manifest_offers_has_a_direction() -> None:
    from methods.registry import load_methods

    offered = [method.hyperparameters.choices.get("keep_best", []) for method in load_methods().values()]
    names = {name for choices in offered for name in choices if name is not None}
    assert len(names) > 5
    assert all(best_metric.is_lower_better(name) is not None for name in names)


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_train_stops_at_the_first_nan_and_keeps_the_last_good_checkpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    poison(monkeypatch, {7}, what)
    job = bench.job(max_steps=20, batch_size=4, checkpoint_steps=1, keep_checkpoints=1)
    with pytest.raises(contract.Refused, match=rf"the {what} became (nan|inf) at step 7.*steps 5, 6 are kept"):
        sft.main(job)
    assert max(curve(job.folder, "loss")) == 6
    assert whole(job.folder) == [5, 6]  # 6 has given the NaN, and nothing proves it to be good
    for step in whole(job.folder):
        kept = load_file(job.checkpoints / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_as_many_updates_as_allowed_are_left_out_and_a_resume_counts_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    poison(monkeypatch, {3, 5, 8}, what)
    given: dict[str, Any] = {"max_steps": 10, "batch_size": 4, "checkpoint_steps": 4, "keep_checkpoints": 9}
    folder = bench.train(stop_after_nonfinite=4, **given)
    assert [text.partition(":")[0] for text in warnings_of(folder)] == ["step 3", "step 5", "step 8"]
    assert sorted(curve(folder, "loss")) == list(range(1, 11))
    assert result_of(folder)["loss"] > 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(folder).values())
    with pytest.raises(contract.Refused, match="at step 8"):
        bench.go_on(folder, 4, **{**given, "stop_after_nonfinite": 3})
    again = bench.go_on(folder, 4, **{**given, "stop_after_nonfinite": 4})
    assert same_weights(folder, again)


def test_a_left_out_update_changes_no_weight(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3}, "gradient")
    given: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "checkpoint_steps": 1, "keep_checkpoints": 9}
    folder = bench.train(stop_after_nonfinite=2, weight_decay=0.1, learning_rate=1e-2, **given)
    before, after = (
        load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(losses(folder)) == 3


def test_the_mean_loss_leaves_out_what_is_not_finite() -> None:
    history = [{"loss": 2.0, "step": 1}, {"loss": float("nan"), "step": 3}, {"loss": 1.0, "step": 4}]
    assert training.mean_loss(history) == 1.5

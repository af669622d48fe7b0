"""Supervised fine-tuning on a tiny model: the same whatever happens, and every parameter does what it says.

A process of its own is used where ending it is the point; elsewhere the stage's `main` runs in the test.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.train import Hyperparameters, TrainConfig
from methods import contract
from methods.sft import training as sft
from methods.toolkit import chat, checkpoints
from methods.toolkit import training as toolkit
from tasks.stages import StageCancelled, StageKilled
from tests.methods import parameter_effects as effects
from tests.methods.stage_jobs import curve, open_job, run_method, signal_running, training_job
from tests.methods.training_bench import (
    Bench,
    interrupt_at,
    kill_stage,
    losses,
    result_of,
    same_as,
    schedule,
    weights,
)

CURVES = ("loss", "learning_rate", "grad_norm", "token_accuracy", "tokens", "epoch")
RESUMED: dict[str, dict[str, Any]] = {
    # 21 rows in batches of 4: six steps an epoch, the last one short.
    "lora": {"epochs": 4, "batch_size": 4, "lora_dropout": 0.3, "learning_rate": 5e-3, "checkpoint_steps": 3},
    "full": {"epochs": 4, "batch_size": 2, "grad_accum_steps": 2, "tuning": "full", "checkpoint_steps": 4},
}


@pytest.fixture
def bench(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Bench:
    return Bench("sft", tiny_model, tiny_rows, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Job folders of trains left alone, LoRA and full."""
    bench = Bench("sft", tiny_model, tiny_rows, tmp_path_factory.mktemp("uninterrupted"))
    return {name: bench.train(**hyper) for name, hyper in RESUMED.items()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_killed_train_resumes_to_the_same_curves_and_weights(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, uninterrupted: dict[str, Path], tuning: str
) -> None:
    step = random.randrange(5, 16)  # noqa: S311
    print("killed at step", step)
    hyper = RESUMED[tuning]
    killer = interrupt_at(tmp_path, step, lambda: kill_stage(tmp_path))
    with pytest.raises(StageKilled):
        run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, **hyper))
    killer.join()
    newest = contract.complete_checkpoints(tmp_path / "checkpoints")[-1]
    # A kill in the middle of writing leaves a folder without the mark, here the newest of all.
    torn = tmp_path / "checkpoints" / "checkpoint-23"
    shutil.copytree(newest, torn)
    (torn / contract.COMPLETE_MARK).unlink()
    assert contract.complete_checkpoints(tmp_path / "checkpoints")[-1] == newest
    run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, resume=newest, **hyper))
    assert not torn.exists()
    same_as(uninterrupted[tuning], tmp_path, CURVES, 24)


def test_a_cancelled_train_saves_a_checkpoint_and_resumes_to_the_same(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    canceller = interrupt_at(tmp_path, 7, lambda: signal_running(tmp_path))
    with pytest.raises(StageCancelled):
        run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, **RESUMED["lora"]))
    canceller.join()
    newest = contract.complete_checkpoints(tmp_path / "checkpoints")[-1]
    assert int(newest.name.rpartition("-")[2]) == max(curve(tmp_path, "loss"))
    run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, resume=newest, **RESUMED["lora"]))
    same_as(uninterrupted["lora"], tmp_path, CURVES, 24)


def test_a_train_whose_last_checkpoint_is_its_end_saves_the_same_once_more(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    # Killed between the last step and the end of saving.
    shutil.copytree(uninterrupted["lora"] / "checkpoints", tmp_path / "checkpoints")
    end = tmp_path / "checkpoints" / "checkpoint-24"
    job = open_job(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, resume=end, **RESUMED["lora"]))
    result = sft.main(job)
    assert result["steps"] == 24
    assert result["loss"] == pytest.approx(result_of(uninterrupted["lora"])["loss"])
    expected = weights(uninterrupted["lora"])
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path).items())


def test_an_epoch_is_evaluated_before_its_last_checkpoint_and_training_goes_on_the_same(
    bench: Bench, tmp_path: Path
) -> None:
    hyper: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lora_dropout": 0.3, "num_generations": 1}
    alone = bench.train(validation=True, checkpoint_steps=6, **hyper)
    checkpoint = tmp_path / "resumed" / "checkpoints" / "checkpoint-6"
    shutil.copytree(alone / "checkpoints" / "checkpoint-6", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [6]
    folder, rows = checkpoint.parents[1], bench.rows
    sft.main(open_job(folder, training_job(folder, bench.base, rows, validation=rows, resume=checkpoint, **hyper)))
    for name in ("loss", "eval_loss"):
        assert curve(folder, name) == {step: values for step, values in curve(alone, name).items() if step > 6}
    assert sorted(curve(alone, "eval_loss")) == [6, 12]  # once each
    expected = weights(alone)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(folder).items())


def test_a_logged_mean_survives_a_resume_between_two_points(bench: Bench) -> None:
    folder = bench.train(max_steps=9, batch_size=4, logging_steps=4, checkpoint_steps=3)
    assert sorted(curve(folder, "loss")) == [1, 3, 4, 6, 8, 9]
    every = bench.losses(max_steps=9, batch_size=4)
    assert result_of(folder)["loss"] == pytest.approx(sum(every) / 9, rel=1e-5)


def test_accumulated_batches_are_the_same_as_one_batch(bench: Bench) -> None:
    hyper: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "optimizer": "sgd", "max_grad_norm": 0}
    whole = bench.train(batch_size=8, **hyper)
    parts = bench.train(batch_size=1, grad_accum_steps=8, **hyper)
    assert len(losses(whole)) == 6  # the last one of each epoch is short
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)
    expected = weights(whole)
    for name, tensor in weights(parts).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-3)


def test_the_seed_decides_the_curve(bench: Bench) -> None:
    hyper: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "lora_dropout": 0.2, "learning_rate": 1e-2}
    first = bench.losses(seed=1, **hyper)
    torch.rand(5)  # whatever ran before in the process
    assert bench.losses(seed=1, **hyper) == first
    assert bench.losses(seed=2, **hyper) != first


def test_the_seed_decides_the_first_weights_of_an_adapter(bench: Bench) -> None:
    def first_weights(seed: int) -> torch.Tensor:
        model = sft.prepare_model(bench.job(seed=seed))
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach()

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_batches_hold_the_labels_of_the_answers_and_pad_them_with_ignored(bench: Bench) -> None:
    trainer = bench.build(batch_size=21)
    batch = next(iter(trainer.get_train_dataloader()))
    end = trainer.processing_class.eos_token_id
    assert trainer.processing_class.pad_token_id == end
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        width = int(mask.sum())
        assert labels[width - 1] == ids[width - 1] == end  # the end token is trained although it is the pad token
        assert (labels[width:] == chat.IGNORED).all()
        trained = labels[labels != chat.IGNORED]
        assert 0 < len(trained) < width
        assert (labels[:width][labels[:width] != chat.IGNORED] == ids[:width][labels[:width] != chat.IGNORED]).all()


def test_a_model_whose_pad_token_is_its_end_token_learns_to_stop(bench: Bench, tiny_model: Path) -> None:
    from methods.toolkit import generating, models

    folder = bench.train(tuning="full", epochs=25, batch_size=4, learning_rate=5e-3, lr_scheduler="constant")
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    prompt = chat.render_prompt(tokenizer, [{"role": "user", "content": "switch the light in the kitchen off"}])
    sampling = generating.Sampling(max_new_tokens=30)
    before = generating.generate(models.load_model(str(tiny_model), "float32").eval(), tokenizer, [prompt], sampling)
    trained = models.load_model(str(folder / "output"), "float32").eval()
    after = generating.generate(trained, tokenizer, [prompt], sampling)
    assert before[0].hit_limit
    assert not after[0].hit_limit
    assert after[0].text == "kitchen on"


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"])
def test_no_schedule_falls_below_its_floor_or_rises_above_the_rate(bench: Bench, scheduler: str) -> None:
    rate, ratio = 1e-3, 0.25
    trainer = bench.build(lr_scheduler=scheduler, learning_rate=rate, lr_decay_ratio=ratio, warmup_steps=5)
    rates = schedule(trainer, 40)
    assert min(rates) >= rate * ratio - 1e-12
    assert max(rates) == pytest.approx(rate)
    if not scheduler.startswith("constant"):
        assert rates[-1] == pytest.approx(rate * ratio, rel=0.1)
        assert rates == rates[:5] + sorted(rates[5:], reverse=True)
    if scheduler != "constant":
        assert rates[:6] == pytest.approx([rate * (ratio + (1 - ratio) * step / 5) for step in range(6)])


def test_a_polynomial_schedule_takes_every_learning_rate(bench: Bench) -> None:
    rates = schedule(bench.build(lr_scheduler="polynomial", learning_rate=1e-8, warmup_ratio=0), 10)
    assert rates == pytest.approx([1e-8 * (1 - step / 10) ** 2 for step in range(10)])


def test_the_order_of_rows_follows_from_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(random.randrange(10**6))  # noqa: S311 - a resumed process has drawn other numbers before
        rows = toolkit.LengthGroupedOrder([n % 17 for n in range(60)], 4, seed)
        rows.set_epoch(epoch)
        return list(rows)

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


def test_the_longest_rows_come_first_and_every_row_once() -> None:
    lengths = [random.randrange(1, 500) for _ in range(103)]  # noqa: S311
    order = toolkit.LengthGroupedOrder(lengths, 8, seed=3)
    rows = list(order)
    assert sorted(rows) == list(range(103))
    assert lengths[rows[0]] == max(lengths)
    order.set_epoch(1)
    assert list(order) != rows
    order.set_epoch(0)
    assert list(order) == rows


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_takes_steps(bench: Bench, tiny_model: Path, optimizer: str) -> None:
    # In full: 8-bit states are used for tensors of 4096 numbers and more only, which no tiny adapter has.
    folder = bench.train(optimizer=optimizer, tuning="full", max_steps=8, batch_size=21, learning_rate=2e-3)
    assert losses(folder)[-1] < losses(folder)[0]
    before, after = load_file(tiny_model / "model.safetensors"), weights(folder)
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradient_checkpointing_changes_no_loss(bench: Bench, tuning: str) -> None:
    hyper: dict[str, Any] = {"tuning": tuning, "max_steps": 4, "batch_size": 8, "learning_rate": 5e-3}
    plain = bench.losses(**hyper)
    assert plain[-1] != plain[0]
    assert bench.losses(gradient_checkpointing=True, **hyper) == pytest.approx(plain, rel=1e-5)


def test_an_adapter_on_a_4bit_base_learns(bench: Bench) -> None:
    found = bench.losses(load_in_4bit=True, max_steps=10, batch_size=21, learning_rate=1e-2)
    assert found[-1] < found[0]


def test_an_evaluation_does_not_disturb_the_training_on_a_4bit_base(bench: Bench) -> None:
    hyper: dict[str, Any] = {"load_in_4bit": True, "max_steps": 8, "batch_size": 4, "learning_rate": 1e-2}
    evaluated = bench.train(validation=True, evaluation_steps=2, num_generations=1, **hyper)
    alone = bench.train(**hyper)
    assert curve(evaluated, "eval_loss")
    assert curve(evaluated, "grad_norm") == curve(alone, "grad_norm")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bfloat16_learns(bench: Bench, tuning: str) -> None:
    found = bench.losses(dtype="bfloat16", tuning=tuning, max_steps=10, batch_size=21, learning_rate=1e-2)
    assert found[-1] < found[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_float16_without_a_gpu_is_refused_with_the_way_out(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match=r"float16 .* set dtype to auto, bfloat16 or float32"):
        bench.train(dtype="float16")


def test_lora_targets_that_the_model_lacks_are_refused_by_name(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"lora_targets names queries, which this model \(llama\) does not have"):
        run_method(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, lora_targets="queries"))


def test_a_diverged_train_is_refused_with_the_way_out(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match=r"the gradient became nan at step 2[\s\S]*learning_rate"):
        bench.train(tuning="full", learning_rate=1.0, weight_decay=1e30, max_steps=6, warmup_steps=0, batch_size=2)


def test_a_torn_checkpoint_is_removed_and_a_whole_one_kept(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
    contract.mark_complete(tmp_path / "checkpoint-1")
    checkpoints.remove_torn_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full").model, bench.build(tuning="lora").model
    assert all(p.requires_grad for p in full.parameters())
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def _num_generations(bench: Bench) -> None:
    folder = bench.train(validation=True, num_generations=3, max_steps=2, evaluation_steps=2)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 2]


EFFECTS: dict[str, effects.Effect] = {
    **effects.COMMON,
    "tuning": _tuning,
    "max_seq_length": effects.kept("max_seq_length", 42, 21),
    "max_input_length": effects.kept("max_input_length", 33, 21),
    "max_content_length": effects.kept("max_content_length", 8, 21),
    "over_length": effects.over_length(42, 21),
    "num_generations": _num_generations,
}


@pytest.mark.parametrize("field", Hyperparameters.model_fields)
def test_every_hyperparameter_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


def test_no_clipping_is_no_clipping(bench: Bench) -> None:
    hyper: dict[str, Any] = {"max_steps": 3, "optimizer": "sgd", "tuning": "full", "learning_rate": 1e-2}
    free, clipped = bench.losses(max_grad_norm=0, **hyper), bench.losses(max_grad_norm=1e-6, **hyper)
    assert free[2] != clipped[2]  # the first step of a warm-up changes nothing
    assert math.isclose(free[0], clipped[0])


def test_every_field_of_a_train_that_goes_to_the_stage_is_in_its_job(home: Path, tmp_path: Path) -> None:
    from configs.records import TrainRecord, now
    from tasks.trains import _training_job, train_folder

    config = TrainConfig(
        name="t",
        base_model="tiny",
        dataset="rows",
        validation_split=0.5,
        max_new_tokens=77,
        method_params={"beta": 0.1},
        hyperparameters=Hyperparameters(seed=9, lora_rank=6),
    )
    record = TrainRecord(
        id="t_1", config=config, origins={}, warnings=[], created=now(), run_id="r", base="tiny", base_path=tmp_path
    )
    folder, resume = train_folder("t_1") / "training", tmp_path / "checkpoint-3"
    job = _training_job(record, folder, resume)
    assert set(Hyperparameters.model_fields) <= set(job.parameters)
    given = config.hyperparameters.model_dump(mode="json")
    assert {name: job.parameters[name] for name in given} == {**given, "lora_alpha": 12}
    assert (job.parameters["max_new_tokens"], job.parameters["beta"]) == (77, 0.1)
    assert (job.seed, job.resume_from, job.inputs["base_model"]) == (9, resume, str(tmp_path))
    assert job.inputs["train_rows"] == str(train_folder("t_1") / "train_rows.jsonl")
    assert job.inputs["validation_rows"] == str(train_folder("t_1") / "validation_rows.jsonl")


def test_max_new_tokens_limits_the_answers_of_an_evaluation(bench: Bench) -> None:
    trainer = bench.build(validation=True)
    trainer.job.parameters["max_new_tokens"] = 2
    trainer.evaluate()
    rows = [json.loads(line) for line in (trainer.job.folder / "samples.jsonl").read_text().splitlines()]
    assert rows
    assert all(len(trainer.processing_class(row["answer"])["input_ids"]) <= 2 for row in rows)

"""KTO and ORPO of a tiny model: they learn preferences, resume to the same, and every parameter counts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import contract
from methods.registry import find_method
from methods.toolkit import chat, models
from tasks.stages import StageCancelled, StageKilled
from tests.methods import parameter_effects as effects
from tests.methods.preference_data import pair_rows, polite_rows, preferences, ranking_rows, write_rows
from tests.methods.stage_jobs import curve, run_method, signal_running
from tests.methods.training_bench import Bench, interrupt_at, kill_stage, same_as

pytestmark = pytest.mark.methods

NAMES = ("kto", "orpo")
CURVES = {
    "kto": ("loss", "learning_rate", "grad_norm", "tokens", "kl", "entropy"),
    "orpo": ("loss", "learning_rate", "grad_norm", "reward_margin", "reward_accuracy", "nll_loss", "log_odds"),
}
RESUMED: dict[str, dict[str, Any]] = {
    # KTO has two rows of every pair: six steps an epoch for both.
    "kto": {"epochs": 2, "batch_size": 8, "lora_dropout": 0.3, "learning_rate": 5e-3, "checkpoint_steps": 3},
    "orpo": {"epochs": 2, "batch_size": 4, "lora_dropout": 0.3, "learning_rate": 5e-3, "checkpoint_steps": 3},
}
STEPS = 12
# From random weights, nearly all of ORPO's loss is that of fine-tuning: after 3 epochs (30 steps) it has fallen from
# 7.8 to 3.2 and 63 % of held-out pairs are told apart, after 10 to 0.7 and 100 %. KTO, whose epochs have twice the
# steps, trains nothing but the preference.
EPOCHS = {"kto": 3, "orpo": 10}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows())


@pytest.fixture
def bench(tiny_model: Path, rows: Path, tmp_path: Path, name: str) -> Bench:
    return Bench(name, tiny_model, rows, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_to_prefer_the_better_answers_of_rows_it_has_not_seen(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    train = write_rows(tmp_path / "train.jsonl", polite_rows(160, seed=1))
    held_out = write_rows(tmp_path / "held_out.jsonl", polite_rows(100, seed=2))
    bench = Bench(name, tiny_model, train, tmp_path / "jobs", held_back=held_out)
    folder = bench.train(validation=True, epochs=EPOCHS[name], batch_size=16, learning_rate=5e-3)
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    tuned = models.load_with_adapter(str(tiny_model), str(folder / "output"), "float32")
    found = [
        preferences(model, tokenizer, held_out)
        for model in (models.load_with_adapter(str(tiny_model), None, "float32"), tuned)
    ]
    right = [sum(margin > 0 for margin in margins) / len(margins) for margins in found]
    margins = [sum(margins) / len(margins) for margins in found]
    print(f"{name}: better answer of held-out pairs likelier {right[0]:.0%} -> {right[1]:.0%}")
    print(f"{name}: margin {margins[0]:.2f} -> {margins[1]:.2f} nats")
    assert right[0] < 0.7
    assert right[1] > 0.9
    evaluated = [value[0] for _, value in sorted(curve(folder, "eval_reward_margin").items())]
    assert evaluated[-1] > evaluated[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_train_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(bench: Bench, name: str) -> None:
    given = {**RESUMED[name], "keep_checkpoints": 10}
    left_alone = bench.train(**given)
    again = bench.go_on(left_alone, 6, **given)
    same_as(left_alone, again, CURVES[name], STEPS, first=7)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_and_a_cancelled_train_resume_to_the_same_curves_and_weights(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    given = RESUMED[name]
    left_alone = bench.train(**given)
    step = random.randrange(4, 10)  # noqa: S311
    print("interrupted at step", step)
    for ended, stop in ((StageKilled, kill_stage), (StageCancelled, signal_running)):
        folder = tmp_path / ended.__name__
        thread = interrupt_at(folder, step, lambda folder=folder, stop=stop: stop(folder))  # type: ignore[misc]
        with pytest.raises(ended):
            run_method(folder, bench.stage_job(folder, **given), method=name)
        thread.join()
        newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
        run_method(folder, bench.stage_job(folder, resume=newest, **given), method=name)
        same_as(left_alone, folder, CURVES[name], STEPS)


@pytest.mark.parametrize("name", ["kto"])
def test_answers_of_kto_are_judged_by_themselves_and_a_ranking_has_one_good_one(bench: Bench) -> None:
    trained = bench.build().train_dataset
    assert (len(trained), sum(trained["label"])) == (42, 21)
    bench.rows = write_rows(bench.root / "rankings.jsonl", ranking_rows())
    trainer = bench.build(batch_size=4)
    assert (len(trainer.train_dataset), sum(trainer.train_dataset["label"])) == (21, 7)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    tokenizer = trainer.processing_class

    def counted(kind: str) -> list[str]:
        pairs = zip(batch[f"{kind}input_ids"], batch[f"{kind}completion_mask"], strict=True)
        return [tokenizer.decode(ids[mask.bool()]).removesuffix(tokenizer.eos_token) for ids, mask in pairs]

    answers = counted("")
    assert sorted(answers[:3]) == ["kitchen on", "no", "off"]
    assert counted("KL_") == [answers[-1], *answers[:-1]]


@pytest.mark.parametrize("name", ["kto"])
def test_a_batch_of_one_is_refused_by_kto(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match="batch_size is 1"):
        bench.build(batch_size=1)


@pytest.mark.parametrize("name", NAMES)
def test_full_tuning_and_a_4bit_base_learn(bench: Bench, name: str) -> None:
    given: dict[str, Any] = {"max_steps": 8, "batch_size": 42, "learning_rate": 5e-3}
    for how in ({"tuning": "full", "learning_rate": 5e-4}, {"load_in_4bit": True}):
        found = bench.losses(**{**given, **how})
        assert found[-1] < 0.9 * found[0], how
    assert {p.dtype for p in bench.build(load_in_4bit=True).model.parameters() if p.requires_grad} == {torch.float32}


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _changes(field: str, value: Any) -> effects.Effect:
    """With the value, the losses of the first steps are others."""
    hurried: dict[str, Any] = {"max_steps": 3, "batch_size": 21, "learning_rate": 5e-3, "warmup_steps": 0}

    def check(bench: Bench) -> None:
        found, usual = bench.losses(**hurried, **{field: value}), bench.losses(**hurried)
        assert all(map(math.isfinite, found))
        assert found != pytest.approx(usual, rel=1e-6)

    return check


def _max_steps(bench: Bench) -> None:
    assert len(bench.losses(max_steps=5, epochs=1, batch_size=8)) == 5
    assert len(bench.losses(epochs=1, batch_size=8)) == (6 if bench.method == "kto" else 3)


def _evaluation_steps(bench: Bench) -> None:
    epoch = 6 if bench.method == "kto" else 3
    folder = bench.train(validation=True, max_steps=4, evaluation_steps=2, batch_size=8)
    assert sorted(curve(folder, "eval_loss")) == [2, 4]
    folder = bench.train(validation=True, epochs=2, batch_size=8)
    assert sorted(curve(folder, "eval_loss")) == [epoch, 2 * epoch]


def _max_samples(bench: Bench) -> None:
    assert len(bench.build(max_samples=5).train_dataset) == (10 if bench.method == "kto" else 5)


def _over_length(bench: Bench) -> None:
    effects.over_length(42, 42 if bench.method == "kto" else 21)(bench)


def _num_generations(bench: Bench) -> None:
    folder = bench.train(validation=True, num_generations=3, max_steps=2, evaluation_steps=2)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["reference"] for sample in samples] == [row["chosen"][-1]["content"] for row in pair_rows()[:3]]


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full").model, bench.build(tuning="lora").model
    assert all(p.requires_grad for p in full.parameters())
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def _lora_dropout(bench: Bench) -> None:
    modules = dict(bench.build(lora_dropout=0.4).model.named_modules())
    assert {m.p for name, m in modules.items() if "lora_dropout" in name and hasattr(m, "p")} == {0.4}


EFFECTS: dict[str, effects.Effect] = {
    **effects.COMMON,
    "tuning": _tuning,
    "lora_dropout": _lora_dropout,
    "max_steps": _max_steps,
    "evaluation_steps": _evaluation_steps,
    "max_samples": _max_samples,
    "max_seq_length": effects.kept("max_seq_length", 42, 42),
    "max_input_length": effects.kept("max_input_length", 33, 42),
    "max_content_length": effects.kept("max_content_length", 8, 42),
    "over_length": _over_length,
    "num_generations": _num_generations,
    "beta": _changes("beta", 0.5),
    "loss_type": _changes("loss_type", "apo_zero_unpaired"),
    "desirable_weight": _changes("desirable_weight", 2.0),
    "undesirable_weight": _changes("undesirable_weight", 0.5),
}
COMMON = [(name, field) for name in NAMES for field in find_method(name).hyperparameter_names]
OWN = [(name, field) for name in NAMES for field in find_method(name).parameters]


@pytest.mark.parametrize(("name", "field"), OWN)
def test_every_parameter_of_its_own_reaches_what_it_is_for(bench: Bench, name: str, field: str) -> None:
    EFFECTS[field](bench)


@pytest.mark.parametrize(("name", "field"), COMMON)
def test_every_common_parameter_reaches_what_it_is_for(bench: Bench, name: str, field: str) -> None:
    EFFECTS[field](bench)

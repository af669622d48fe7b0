"""Direct preference optimization of a tiny model: it learns, resumes to the same, and every parameter counts."""

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
from tests.methods.training_bench import Bench, interrupt_at, kill_stage, losses, result_of, same_as

pytestmark = pytest.mark.methods

METHOD = find_method("dpo")
CURVES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "reward_margin",
    "reward_accuracy",
    "reward_chosen",
    "reward_rejected",
)
RESUMED: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 3, "batch_size": 4, "lora_dropout": 0.3, "learning_rate": 5e-3, "checkpoint_steps": 3}
    | {"keep_checkpoints": 10},
    "full": {"epochs": 3, "batch_size": 2, "grad_accum_steps": 2, "tuning": "full", "learning_rate": 1e-4}
    | {"checkpoint_steps": 4, "keep_checkpoints": 10, "reference_in_advance": True},
}
STEPS = 18
LOSSES = METHOD.parameters["loss_type"]["enum"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows())


@pytest.fixture
def bench(tiny_model: Path, rows: Path, tmp_path: Path) -> Bench:
    return Bench("dpo", tiny_model, rows, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Job folders of trains left alone, LoRA and full."""
    bench = Bench("dpo", tiny_model, rows, tmp_path_factory.mktemp("uninterrupted"))
    return {name: bench.train(**given) for name, given in RESUMED.items()}


def test_it_learns_to_prefer_the_better_answers_of_rows_it_has_not_seen(tiny_model: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", polite_rows(160, seed=1))
    held_out = write_rows(tmp_path / "held_out.jsonl", polite_rows(40, seed=2))
    bench = Bench("dpo", tiny_model, train, tmp_path / "jobs", held_back=held_out)
    folder = bench.train(validation=True, epochs=3, batch_size=8, learning_rate=5e-3, beta=0.1, evaluation_steps=20)
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    before = preferences(models.load_with_adapter(str(tiny_model), None, "float32"), tokenizer, held_out)
    tuned = models.load_with_adapter(str(tiny_model), str(folder / "output"), "float32")
    after = preferences(tuned, tokenizer, held_out)
    right = [sum(margin > 0 for margin in margins) / len(margins) for margins in (before, after)]
    margins = [sum(margins) / len(margins) for margins in (before, after)]
    reward_margin = curve(folder, "eval_reward_margin")[60][0]
    print(f"held-out pairs: better answer likelier {right[0]:.0%} -> {right[1]:.0%}")
    print(f"margin {margins[0]:.2f} -> {margins[1]:.2f} nats, of DPO's rewards 0 -> {reward_margin:.2f}")
    assert right[0] < 0.7
    assert right[1] > 0.9
    # What the trainer calls the margin is what training added to the difference of likelihoods, times beta.
    assert reward_margin == pytest.approx(0.1 * (margins[1] - margins[0]), rel=0.02)
    assert curve(folder, "eval_reward_accuracy")[60][0] > 0.9
    assert curve(folder, "loss")[1][0] == pytest.approx(math.log(2), rel=1e-5)  # no margin at the first step


def test_the_curves_of_training_and_evaluation_have_the_names_of_every_method(bench: Bench) -> None:
    folder = bench.train(validation=True, max_steps=2, evaluation_steps=1)
    expected = [*CURVES, "token_accuracy", "entropy", "epoch", "tokens_per_second", "padding_share", "memory_gib"]
    expected += [
        "eval_loss",
        "eval_reward_margin",
        "eval_reward_accuracy",
        "eval_reward_chosen",
        "eval_reward_rejected",
    ]
    expected += ["logp_chosen", "logp_rejected", "eval_logp_chosen", "eval_logp_rejected"]
    assert [name for name in expected if sorted(curve(folder, name)) != [1, 2]] == []


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_train_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(
    bench: Bench, uninterrupted: dict[str, Path], tuning: str
) -> None:
    step = 9 if tuning == "lora" else 8
    again = bench.go_on(uninterrupted[tuning], step, **RESUMED[tuning])
    same_as(uninterrupted[tuning], again, CURVES, STEPS, first=step + 1)
    # Killed between the last step and the end of saving.
    once_more = bench.go_on(uninterrupted[tuning], STEPS, **RESUMED[tuning])
    assert result_of(once_more)["loss"] == pytest.approx(result_of(uninterrupted[tuning])["loss"])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_killed_train_resumes_to_the_same_curves_and_weights(
    bench: Bench, tmp_path: Path, uninterrupted: dict[str, Path], tuning: str
) -> None:
    step = random.randrange(5, 14)  # noqa: S311
    print("killed at step", step)
    folder, given = tmp_path / "killed", RESUMED[tuning]
    killer = interrupt_at(folder, step, lambda: kill_stage(folder))
    with pytest.raises(StageKilled):
        run_method(folder, bench.stage_job(folder, **given), method="dpo")
    killer.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    run_method(folder, bench.stage_job(folder, resume=newest, **given), method="dpo")
    same_as(uninterrupted[tuning], folder, CURVES, STEPS)


def test_a_cancelled_train_saves_a_checkpoint_and_resumes_to_the_same(
    bench: Bench, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    folder = tmp_path / "cancelled"
    canceller = interrupt_at(folder, 7, lambda: signal_running(folder))
    with pytest.raises(StageCancelled):
        run_method(folder, bench.stage_job(folder, **RESUMED["lora"]), method="dpo")
    canceller.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    assert int(newest.name.rpartition("-")[2]) == max(curve(folder, "loss"))
    run_method(folder, bench.stage_job(folder, resume=newest, **RESUMED["lora"]), method="dpo")
    same_as(uninterrupted["lora"], folder, CURVES, STEPS)


def test_a_reference_worked_out_in_advance_is_the_same_reference(bench: Bench) -> None:
    for tuning in ("lora", "full"):
        given: dict[str, Any] = {"tuning": tuning, "max_steps": 4, "batch_size": 8, "learning_rate": 1e-3}
        beside = bench.train(validation=True, evaluation_steps=4, **given)
        before = bench.train(validation=True, evaluation_steps=4, reference_in_advance=True, **given)
        assert losses(before) == pytest.approx(losses(beside), rel=1e-4)
        assert curve(before, "eval_loss")[4] == pytest.approx(curve(beside, "eval_loss")[4], rel=1e-4)
        assert losses(beside)[-1] < losses(beside)[0]


def test_accumulated_batches_are_the_same_as_one_batch(bench: Bench) -> None:
    given: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-3, "optimizer": "sgd", "max_grad_norm": 0}
    assert bench.losses(batch_size=7, **given) == pytest.approx(
        bench.losses(batch_size=1, grad_accum_steps=7, **given), abs=1e-4
    )


def test_an_adapter_on_a_4bit_base_learns_and_is_held_in_float32(bench: Bench) -> None:
    trainer = bench.build(load_in_4bit=True)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    found = bench.losses(load_in_4bit=True, max_steps=10, batch_size=21, learning_rate=1e-2)
    assert found[-1] < 0.9 * found[0]


def test_rankings_are_trained_as_pairs_of_the_best_and_each_worse_answer(bench: Bench, tmp_path: Path) -> None:
    bench.rows = write_rows(tmp_path / "rankings.jsonl", ranking_rows())
    folder = bench.train(epochs=8, learning_rate=5e-3)
    report = json.loads((folder / "rows.json").read_text())["train"]
    assert (report["read"], report["pairs"], report["kept"]) == (7, 14, 14)
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]


def test_settings_that_do_not_fit_each_other_are_refused_or_warned_of(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match=r"f_divergence_type='forward_kl'.* is only supported for"):
        bench.build(loss_type="apo_zero", f_divergence="forward_kl")
    with pytest.raises(contract.Refused, match="WPO-style weighting is not implemented for 'aot'"):
        bench.build(loss_type="aot", use_weighting=True)
    with pytest.raises(contract.Refused, match="queries"):
        bench.build(lora_targets="queries")
    folder = bench.build(label_smoothing=0.2, discopop_tau=0.1, f_alpha=2.0).job.folder
    events = [json.loads(line) for line in (folder / contract.EVENTS_FILE).read_text().splitlines()]
    warned = [event["text"] for event in events if event["type"] == "warning"]
    assert [text.split()[0] for text in warned] == ["label_smoothing", "discopop_tau", "f_alpha"]
    folder = bench.build(loss_type="robust", label_smoothing=0.2).job.folder
    assert "label_smoothing" not in (folder / contract.EVENTS_FILE).read_text()


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _first_losses(bench: Bench, **given: Any) -> list[float]:
    return bench.losses(
        max_steps=3, batch_size=21, learning_rate=5e-3, lr_scheduler="constant", warmup_steps=0, **given
    )


def _changes(field: str, value: Any, **with_: Any) -> effects.Effect:
    """With the value, the losses of the first steps are others."""

    def check(bench: Bench) -> None:
        found, usual = _first_losses(bench, **{field: value}, **with_), _first_losses(bench, **with_)
        assert all(map(math.isfinite, found))
        assert found != pytest.approx(usual, rel=1e-6)

    return check


def _sft_weight(bench: Bench) -> None:
    weighted, plain = _first_losses(bench, sft_weight=2.0), _first_losses(bench)
    assert weighted[0] > plain[0] + 1  # the likelihood of the random model's answers is low
    assert bench.build(sft_weight=2.0).loss_weights == [1.0, 2.0]


def _loss_type(bench: Bench) -> None:
    # Where the model is the reference: the losses as published, at a margin of 0.
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "sppo_hard": 50.0, "bco_pair": 2 * math.log(2)}
    for name, value in expected.items():
        assert bench.losses(loss_type=name, max_steps=1)[0] == pytest.approx(value, rel=1e-4), name


def _label_smoothing(bench: Bench) -> None:
    assert bench.build(loss_type="robust").label_smoothing == 0.1
    assert bench.build(loss_type="exo_pair").label_smoothing == 1e-3
    assert bench.build(loss_type="robust", label_smoothing=0.0).label_smoothing == 0.0
    _changes("label_smoothing", 0.3, loss_type="robust")(bench)


def _reference_in_advance(bench: Bench) -> None:
    trainer = bench.build(reference_in_advance=True, tuning="full")
    assert trainer.ref_model is None
    assert len(trainer.train_dataset["ref_chosen_logps"]) == 21
    assert bench.build(tuning="full").ref_model is not None


def _lora_dropout(bench: Bench) -> None:
    effects.lora("lora_dropout", "lora_dropout", 0.4)(bench)
    modules = dict(bench.build(lora_dropout=0.4).model.named_modules())
    assert {m.p for name, m in modules.items() if "lora_dropout" in name and hasattr(m, "p")} == {0.4}


def _num_generations(bench: Bench) -> None:
    folder = bench.train(validation=True, num_generations=3, max_steps=2, evaluation_steps=2)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 2]
    assert [sample["reference"] for sample in samples] == [row["chosen"][-1]["content"] for row in pair_rows()[:3]]


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full").model, bench.build(tuning="lora").model
    assert all(p.requires_grad for p in full.parameters())
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


EFFECTS: dict[str, effects.Effect] = {
    **effects.COMMON,
    "tuning": _tuning,
    "lora_dropout": _lora_dropout,
    "max_seq_length": effects.kept("max_seq_length", 42, 21),
    "max_input_length": effects.kept("max_input_length", 33, 21),
    "max_content_length": effects.kept("max_content_length", 8, 21),
    "over_length": effects.over_length(42, 21),
    "num_generations": _num_generations,
    "beta": _changes("beta", 0.5),
    "loss_type": _loss_type,
    "sft_weight": _sft_weight,
    "label_smoothing": _label_smoothing,
    "discopop_tau": _changes("discopop_tau", 1.0, loss_type="discopop"),
    "f_divergence": _changes("f_divergence", "js_divergence"),
    "f_alpha": _changes("f_alpha", 2.0, f_divergence="alpha_divergence"),
    "length_desensitization": _changes("length_desensitization", 0.2),
    "use_weighting": _changes("use_weighting", True),
    "reference_in_advance": _reference_in_advance,
}


@pytest.mark.parametrize("field", METHOD.parameters)
def test_every_parameter_of_its_own_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


@pytest.mark.parametrize("field", METHOD.hyperparameter_names)
def test_every_common_parameter_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_widens_the_margin(bench: Bench, loss_type: str) -> None:
    folder = bench.train(loss_type=loss_type, max_steps=10, batch_size=21, learning_rate=5e-3)
    margins = curve(folder, "reward_margin")
    assert margins[10][0] > margins[1][0] + 0.05
    assert result_of(folder)["steps"] == 10

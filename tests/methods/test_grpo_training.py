"""GRPO on a tiny model: it learns from rewards alone, the same whatever happens, and every parameter has its effect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import contract
from methods.grpo import training as grpo
from methods.grpo_demo import training as grpo_demo
from methods.registry import find_method
from methods.toolkit import chat, generating, models, training
from methods.toolkit.tiny_models import make_tiny_reward_model
from tests.methods import parameter_effects as effects
from tests.methods import switches
from tests.methods.stage_jobs import curve
from tests.methods.training_bench import Bench, losses, result_of, weights

pytestmark = pytest.mark.methods

LEARNING: dict[str, Any] = {
    "max_steps": 24,
    "batch_size": 64,
    "num_generations": 4,
    "lora_rank": 16,
    "learning_rate": 1e-2,
    "lr_scheduler": "linear",
    "warmup_steps": 3,
    "max_content_length": 4,
    "evaluation_steps": 8,
}
SHORT: dict[str, Any] = {"batch_size": 8, "num_generations": 4, "max_content_length": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with `on` or `off`, most often the wrong one."""
    pairs = switches.questions()[:60]
    return switches.taught_model(tiny_model, tmp_path_factory.mktemp("taught") / "model", pairs, steps=40)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return switches.write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", switches.questions()[:60])


@pytest.fixture(scope="module")
def held_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return switches.write_rows(tmp_path_factory.mktemp("rows") / "held.jsonl", switches.questions()[60:])


@pytest.fixture
def bench(taught: Path, rows: Path, held_back: Path, tmp_path: Path) -> Bench:
    return Bench("grpo", taught, rows, tmp_path, held_back)


@pytest.fixture(scope="module")
def learned(taught: Path, rows: Path, held_back: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job folder of a train on the task."""
    bench = Bench("grpo", taught, rows, tmp_path_factory.mktemp("learned"), held_back)
    return bench.train(validation=True, **LEARNING)


def test_settings_of_the_models_own_generation_config_bend_no_sample(taught: Path, rows: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    shutil.copytree(taught, bent)
    own = {"suppress_tokens": list(range(3, 300)), "repetition_penalty": 5.0, "min_p": 0.9, "no_repeat_ngram_size": 1}
    file = bent / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    folders = [Bench("grpo", base, rows, tmp_path / f"jobs-{base.name}").train(**SHORT) for base in (taught, bent)]
    assert curve(folders[0], "reward") == curve(folders[1], "reward")
    assert curve(folders[0], "completion_length") == curve(folders[1], "completion_length")
    assert losses(folders[0]) == losses(folders[1])


# --- learning -------------------------------------------------------------------------------------------------------


def test_reward_and_accuracy_on_held_out_questions_rise(learned: Path) -> None:
    reward, accuracy = curve(learned, "reward"), curve(learned, "eval_reward_exact")
    before, after = reward[1][0], sum(reward[step][0] for step in (22, 23, 24)) / 3
    print(f"reward {before:.2f} → {after:.2f}; held-out accuracy {accuracy[0][0]:.2f} → {accuracy[24][0]:.2f}")
    assert before < 0.6
    assert after > 0.85
    assert accuracy[0][0] <= 0.5
    assert accuracy[24][0] >= 0.8
    samples = [json.loads(line) for line in (learned / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 8, 16, 24}
    last = [sample for sample in samples if sample["step"] == 24]
    assert sum(sample["answer"] == sample["reference"] for sample in last) / len(last) == accuracy[24][0]


def test_what_is_saved_answers_as_the_evaluation_said(learned: Path, taught: Path, held_back: Path) -> None:
    tokenizer, _ = chat.load_tokenizer(str(learned / "output"))
    model = models.load_with_adapter(str(taught), str(learned / "output"), "float32")
    asked = switches.questions()[60:]
    prompts = [chat.render_prompt(tokenizer, [{"role": "user", "content": question}]) for question, _ in asked]
    answers = generating.generate(model, tokenizer, prompts, generating.Sampling(max_new_tokens=8))
    right = sum(answer.text == wanted for answer, (_, wanted) in zip(answers, asked, strict=True))
    assert right / len(asked) == curve(learned, "eval_reward_exact")[24][0]


def test_every_curve_begins_at_the_first_step(learned: Path) -> None:
    names = ("loss", "reward", "reward_exact", "reward_std", "kl", "entropy", "completion_length", "learning_rate")
    names += ("grad_norm", "tokens", "tokens_per_second", "memory_gib", "completion_clipped_share", "epoch")
    for name in names:
        assert sorted(curve(learned, name)) == list(range(1, 25)), name
    assert curve(learned, "reward") == curve(learned, "reward_exact")
    assert curve(learned, "kl")[1] == pytest.approx([0], abs=1e-6)
    assert sorted(curve(learned, "eval_reward")) == [0, 8, 16, 24]


def test_full_tuning_and_a_4bit_base_learn(bench: Bench) -> None:
    for hyper in ({"tuning": "full", "learning_rate": 2e-3}, {"load_in_4bit": True, "learning_rate": 1e-2}):
        folder = bench.train(**{**LEARNING, **hyper, "max_steps": 10})
        found = [values[0] for _, values in sorted(curve(folder, "reward").items())]
        print(hyper, [round(value, 2) for value in found])
        assert sum(found[-3:]) > sum(found[:3])


# --- the same whatever happens --------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    # Two updates on the same answers: after an odd step the answers are in the middle of their use.
    "lora": {"num_iterations": 2, "lora_dropout": 0.3, "learning_rate": 5e-3, "batch_size": 8},
    "full": {"tuning": "full", "batch_size": 4, "grad_accum_steps": 2, "learning_rate": 1e-3},
}
# Ten prompts, two an update: an epoch ends after five updates on new answers.
AGAIN = {"num_generations": 4, "max_content_length": 4, "max_samples": 10, "max_steps": 12, "keep_checkpoints": 20}
CURVES = ("loss", "reward", "reward_exact", "reward_std", "kl", "entropy", "grad_norm", "learning_rate", "tokens")


@pytest.fixture(scope="module", params=["lora", "full"])
def uninterrupted(
    request: pytest.FixtureRequest, taught: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The parameters of a train that was left alone, and its job folder."""
    given = {**AGAIN, **RESUMED[request.param]}
    bench = Bench("grpo", taught, rows, tmp_path_factory.mktemp("uninterrupted"))
    return given, bench.train(checkpoint_steps=1, **given)


def test_a_resumed_train_is_the_uninterrupted_one(bench: Bench, uninterrupted: tuple[dict[str, Any], Path]) -> None:
    given, whole = uninterrupted
    torch.rand(7)  # whatever was drawn before
    resumed = bench.train(resume=whole / "checkpoints" / "checkpoint-5", **given)
    for name in CURVES:
        expected = {step: values for step, values in curve(whole, name).items() if step > 5}
        assert curve(resumed, name) == expected, name
    left, right = weights(whole), weights(resumed)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert result_of(resumed)["loss"] == pytest.approx(result_of(whole)["loss"], rel=1e-6)
    assert len(set(losses(whole))) > 6


def test_a_cancelled_train_leaves_a_checkpoint_and_goes_on_to_the_same(
    bench: Bench, uninterrupted: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, whole = uninterrupted

    def stop_at_seven(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.job.cancelled = self.job.cancelled or state.global_step == 7

    with monkeypatch.context() as patch:
        patch.setattr(training.EventWriter, "on_step_end", stop_at_seven)
        job = bench.job(**given)
        with pytest.raises(contract.Cancelled):
            grpo.main(job)
    left = contract.complete_checkpoints(job.checkpoints)
    assert [path.name for path in left] == ["checkpoint-7"]
    resumed = bench.train(resume=left[0], **given)
    assert curve(resumed, "loss") == {step: values for step, values in curve(whole, "loss").items() if step > 7}


def test_the_seed_decides_the_answers(bench: Bench) -> None:
    given = {**SHORT, "max_steps": 1}
    first = bench.train(seed=1, **given)
    torch.rand(5)
    assert curve(bench.train(seed=1, **given), "entropy") == curve(first, "entropy")
    assert curve(bench.train(seed=2, **given), "entropy") != curve(first, "entropy")


def test_prompts_come_in_groups_none_left_out() -> None:
    order = training.LengthGroupedOrder([1 + n % 5 for n in range(7)], None, seed=3)
    rows = list(grpo.GroupOrder(order, prompts=3, answers=2, uses=2))
    assert len(rows) == len(grpo.GroupOrder(order, 3, 2, 2)) == 3 * 3 * 2 * 2
    batches = [rows[start : start + 6] for start in range(0, len(rows), 6)]
    assert batches[::2] == batches[1::2]
    prompts = [row for batch in batches[::2] for row in batch[::2]]
    assert [row for batch in batches[::2] for row in batch[1::2]] == prompts
    assert prompts[:7] == list(order)
    assert prompts[7:] == prompts[:2]
    few = grpo.GroupOrder(training.LengthGroupedOrder([1, 1], None, seed=3), prompts=5, answers=1, uses=1)
    assert sorted(set(few)) == [0, 1]
    assert len(list(few)) == 5


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_hold_the_answers_of_a_prompt_is_refused(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match=r"10 answers an update.*no multiple.*\(4.*set batch_size to 8"):
        bench.build(batch_size=5, grad_accum_steps=2, num_generations=4)
    with pytest.raises(contract.Refused, match="set it to 2 or more"):
        bench.build(num_generations=1)


def test_an_adapter_on_nothing_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match="queries"):
        bench.build(lora_targets="queries")


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _num_generations(bench: Bench) -> None:
    assert bench.build(batch_size=6, num_generations=3).args.num_generations == 3


def _max_content_length(bench: Bench) -> None:
    folder = bench.train(**{**SHORT, "max_content_length": 1, "max_steps": 1})
    assert curve(folder, "completion_length")[1] == [1]
    assert curve(folder, "completion_clipped_share")[1] == [1]


def _max_input_length(bench: Bench) -> None:
    lengths = bench.build().lengths
    assert len(set(lengths)) > 1
    assert max(bench.build(max_input_length=max(lengths) - 1).lengths) < max(lengths)


def _max_seq_length(bench: Bench) -> None:
    longest = max(bench.build().lengths)
    assert bench.build().args.max_completion_length == 512
    assert bench.build(max_seq_length=2 * longest - 1).args.max_completion_length == longest - 1


def _over_length(bench: Bench) -> None:
    limit = max(bench.build().lengths) - 1
    kept = len(bench.build(max_input_length=limit).train_dataset)
    assert kept < len(bench.build(max_input_length=limit, over_length="truncate").train_dataset) == 60
    with pytest.raises(contract.Refused, match=f"max_input_length is {limit}"):
        bench.build(max_input_length=limit, over_length="error")


def _evaluation_steps(bench: Bench) -> None:
    given = {**SHORT, "max_steps": 3, "max_samples": 4}
    assert sorted(curve(bench.train(validation=True, evaluation_steps=1, **given), "eval_reward")) == [0, 1, 2, 3]
    # Two updates go through four prompts.
    assert sorted(curve(bench.train(validation=True, **given), "eval_reward")) == [0, 2, 3]


def _group_by_length(bench: Bench) -> None:
    def spread(*, grouped: bool) -> int:
        trainer = bench.build(**{**SHORT, "group_by_length": grouped})
        batches = [[row["length"] for row in batch] for batch in trainer.get_train_dataloader()]
        return sum(max(lengths) - min(lengths) for lengths in batches)

    assert spread(grouped=True) < spread(grouped=False)


def _max_steps(bench: Bench) -> None:
    assert len(bench.losses(**{**SHORT, "max_steps": 3})) == 3


def _epochs(bench: Bench) -> None:
    assert len(bench.losses(**{**SHORT, "max_steps": None, "epochs": 1.5, "max_samples": 4})) == 3


def _checkpoints(bench: Bench) -> None:
    folder = bench.train(**{**SHORT, "max_steps": 3, "checkpoint_steps": 1, "keep_checkpoints": 2})
    found = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert found == ["checkpoint-2", "checkpoint-3"]


def _logging_steps(bench: Bench) -> None:
    found = curve(bench.train(**{**SHORT, "max_steps": 4, "logging_steps": 3}), "reward")
    assert sorted(found) == [1, 3, 4]


def _batch_size(bench: Bench) -> None:
    assert len(bench.build(batch_size=4, num_generations=4).get_train_dataloader()) == 60
    assert len(bench.build(batch_size=8, num_generations=4).get_train_dataloader()) == 30


def _grad_accum_steps(bench: Bench) -> None:
    trainer = bench.build(batch_size=4, grad_accum_steps=3, num_generations=4)
    assert (trainer.args.gradient_accumulation_steps, trainer.args.generation_batch_size) == (3, 12)


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full"), bench.build(tuning="lora")
    assert all(p.requires_grad for p in full.model.parameters())
    assert full.ref_model is not None
    assert full.ref_model is not full.model
    trained = {name.split(".")[-3] for name, p in lora.model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert lora.ref_model is None  # it is the model without its adapter


REWARDED: dict[str, Any] = {**SHORT, "max_steps": 3, "max_samples": 4}
COMMON: dict[str, Callable[[Bench], None]] = {
    **effects.COMMON,
    "max_seq_length": _max_seq_length,
    "max_input_length": _max_input_length,
    "max_content_length": _max_content_length,
    "over_length": _over_length,
    "num_generations": _num_generations,
    "epochs": _epochs,
    "max_steps": _max_steps,
    "batch_size": _batch_size,
    "grad_accum_steps": _grad_accum_steps,
    "checkpoint_steps": effects.argument("save_steps", "checkpoint_steps", 7),
    "keep_checkpoints": _checkpoints,
    "evaluation_steps": _evaluation_steps,
    "keep_best": lambda bench: effects.keep_best(bench, "eval_reward_exact", **REWARDED),
    "early_stopping_patience": lambda bench: effects.early_stopping(bench, "eval_reward", **REWARDED),
    "early_stopping_threshold": lambda bench: effects.early_stopping(bench, "eval_reward", **REWARDED),
    "stop_after_nonfinite": lambda bench: effects.stop_after_nonfinite(bench, **SHORT),
    "logging_steps": _logging_steps,
    "group_by_length": _group_by_length,
    "tuning": _tuning,
}


@pytest.mark.parametrize("field", find_method("grpo").hyperparameter_names)
def test_every_hyperparameter_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    COMMON[field](bench)


def _rewards(bench: Bench) -> None:
    wanted = [{"name": "regex", "pattern": "o", "weight": 3.0}, {"name": "length", "minimum": 2}]
    folder = bench.train(rewards=wanted, **SHORT)
    found = [curve(folder, name)[1][0] for name in ("reward", "reward_regex", "reward_length")]
    assert found == pytest.approx([3.5, 1, 0.5], abs=0.2)
    assert found[0] == pytest.approx(3 * found[1] + found[2])


def _reward_file(bench: Bench) -> None:
    path = bench.root / "mine.py"
    path.write_text(
        "def given(prompts, completions, reference, line, tokens, **columns):\n"
        "    assert {len(prompts), len(completions), len(reference), len(line), len(tokens)} == {8}\n"
        "    assert all(prompt[-1]['content'].split()[0] == right for prompt, right in zip(prompts, reference))\n"
        "    return tokens\n"
    )
    folder = bench.train(reward_file=str(path), **SHORT)
    assert curve(folder, "reward_given") == curve(folder, "completion_length")


def _reward_model(bench: Bench) -> None:
    judge = make_tiny_reward_model(bench.base, bench.root / "judge", seed=2)
    model = {"path": str(judge), "base_model": None, "adapter": False, "method": "reward"}
    folder = bench.train(models={"reward_model": model}, reward_model="judge", **SHORT)
    assert len({values[0] for values in curve(folder, "reward_reward_model").values()}) == 2
    with pytest.raises(contract.Refused, match="trained by the method sft, not by reward"):
        bench.build(models={"reward_model": {**model, "method": "sft"}}, reward_model="judge")


def _temperature(bench: Bench) -> None:
    cold = bench.train(**{**SHORT, "temperature": 0.01, "max_steps": 1})
    assert curve(cold, "reward_equal_share")[1] == [1]
    assert bench.build(temperature=0.5).temperature == 0.5


def _beta(bench: Bench) -> None:
    assert curve(bench.train(**{**SHORT, "beta": 0.0}), "kl") == {}
    assert bench.build(beta=0.3).beta == 0.3


def _num_iterations(bench: Bench) -> None:
    folder = bench.train(**{**SHORT, "num_iterations": 2, "max_steps": 4})
    assert sorted(curve(folder, "reward")) == [1, 3]  # answered anew at every second step
    assert len(losses(folder)) == 4


OWN: dict[str, Callable[[Bench], None]] = {
    "rewards": _rewards,
    "reward_model": _reward_model,
    "reward_file": _reward_file,
    "temperature": _temperature,
    "top_p": lambda bench: _equal(bench.build(top_p=0.5).generation_config.top_p, 0.5),
    "beta": _beta,
    "epsilon": lambda bench: _equal(bench.build(epsilon=0.1).epsilon_low, 0.1),
    "epsilon_high": lambda bench: _equal(
        (bench.build(epsilon=0.1).epsilon_high, bench.build(epsilon_high=0.3).epsilon_high), (0.1, 0.3)
    ),
    "num_iterations": _num_iterations,
    "loss_type": effects.argument("loss_type", "loss_type", "dr_grpo"),
    "scale_rewards": effects.argument("scale_rewards", "scale_rewards", "none"),
    "mask_truncated": effects.argument("mask_truncated_completions", "mask_truncated", True),
}


def _equal(found: object, expected: object) -> None:
    assert found == expected


@pytest.mark.parametrize("name", find_method("grpo").parameters)
def test_every_parameter_of_its_own_reaches_what_it_is_for(bench: Bench, name: str) -> None:
    OWN[name](bench)


@pytest.mark.parametrize("loss", find_method("grpo").parameters["loss_type"]["enum"])
def test_every_loss_takes_steps(bench: Bench, loss: str) -> None:
    folder = bench.train(**{**SHORT, "loss_type": loss, "num_iterations": 2})
    assert all(torch.isfinite(torch.tensor(losses(folder))))


# --- the demo -------------------------------------------------------------------------------------------------------


def test_the_demo_is_grpo_with_what_it_does_not_ask_for_at_its_default() -> None:
    asked, whole = find_method("grpo-demo").parameters, find_method("grpo").parameters
    defaults = find_method("grpo").parameter_defaults
    assert {name: value for name, value in defaults.items() if name not in asked} == grpo_demo.SETTINGS
    for name in ("temperature", "beta"):
        assert asked[name] == whole[name]
    options = asked["rewards"]["items"]["properties"]
    assert (
        options | {"name": whole["rewards"]["items"]["properties"]["name"]} == whole["rewards"]["items"]["properties"]
    )


def test_every_parameter_of_the_demo_reaches_the_trainer_of_grpo(bench: Bench) -> None:
    given = {"temperature": 0.5, "beta": 0.3, "rewards": [{"name": "json", "weight": 2.0}], "lora_rank": 3}
    demo = Bench("grpo-demo", bench.base, bench.rows, bench.root / "demo")
    trainer = demo.build(**given, dtype="float32")
    assert (trainer.temperature, trainer.beta, trainer.reward_func_names) == (0.5, 0.3, ["json"])
    assert trainer.model.peft_config["default"].r == 3
    job = demo.job(**given)
    assert set(job.parameters) | set(grpo_demo.SETTINGS) == set(bench.job().parameters)
    assert {name: trainer.job.parameters[name] for name in given} == given
    ready = demo.build(dtype="float32")
    assert ready.reward_func_names == ["exact", "regex", "length"]
    assert ready.args.reward_weights == [2.0, 0.5, 0.5]
    assert (ready.args.max_steps, ready.args.per_device_train_batch_size, ready.num_generations) == (30, 32, 8)

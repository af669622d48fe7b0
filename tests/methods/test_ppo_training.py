"""PPO in the environment that it names: it learns from a reward model, resumes to the same, every parameter counts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.registry import find_method
from tasks.stages import StageCancelled, StageJob, run_stage, stage_environment
from tests.method_environments import method_python
from tests.methods import switches
from tests.methods.stage_jobs import curve, open_job, signal_running, training_job, wait_for
from tests.methods.training_bench import Bench, result_of

pytestmark = pytest.mark.methods

METHOD = find_method("ppo")
LEARNING: dict[str, Any] = {
    "max_steps": 14,
    "batch_size": 32,
    "grad_accum_steps": 1,
    "lora_rank": 16,
    "actor_learning_rate": 5e-3,
    "critic_learning_rate": 5e-3,
    "warmup_steps": 2,
    "max_content_length": 4,
    "temperature": 1.0,
    "evaluation_steps": 7,
}
SHORT = {
    **LEARNING,
    "max_steps": 6,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "checkpoint_steps": 1,
    "keep_checkpoints": 9,
}
CURVES = (
    "loss",
    "policy_loss",
    "value_loss",
    "reward",
    "kl",
    "entropy",
    "grad_norm",
    "learning_rate",
    "tokens",
    "epoch",
)


@pytest.fixture(scope="module")
def python() -> Path:
    return method_python("ppo", "ppo")


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the taught model, its questions, and those that are held back."""
    folder = tmp_path_factory.mktemp("ppo")
    pairs = switches.questions()
    switches.taught_model(tiny_model, folder / "taught", pairs[:60], steps=40)
    switches.write_rows(folder / "train.jsonl", pairs[:60])
    switches.write_rows(folder / "held.jsonl", pairs[60:])
    return folder


@pytest.fixture(scope="module")
def judge(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reward model trained here, by the method reward, on right and wrong answers; as a stage finds it."""
    train, held = (
        switches.write_pairs(place / "pairs.jsonl", 0, 60),
        switches.write_pairs(place / "unseen.jsonl", 60, 80),
    )
    bench = Bench("reward", place / "taught", train, tmp_path_factory.mktemp("reward"), held)
    folder = bench.train(validation=True, lora_rank=16, learning_rate=1e-2, batch_size=16, epochs=10)
    accuracy = [values[-1] for _, values in sorted(curve(folder, "eval_reward_accuracy").items())]
    print(f"reward model: {accuracy[-1]:.0%} of held-out pairs ranked right")
    assert accuracy[-1] >= 0.9
    base = str(place / "taught")
    return {"path": str(folder / "output"), "base_model": base, "adapter": True, "method": "reward"}


def job_of(folder: Path, place: Path, **given: Any) -> StageJob:
    rows, held = place / "train.jsonl", place / "held.jsonl"
    return training_job(folder, place / "taught", rows, validation=held, method="ppo", **given)


def train(python: Path, folder: Path, place: Path, **given: Any) -> Path:
    """Run the stage as the system does; returns its job folder."""
    run_stage(folder, job_of(folder, place, **given), python, METHOD.stage_file("training"), 60, lambda events: None)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    (file,) = (folder / "output").glob("*.safetensors")
    return dict(load_file(file))


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


# --- learning -------------------------------------------------------------------------------------------------------


def test_the_reward_of_a_trained_reward_model_rises_near_the_reference(
    python: Path, place: Path, judge: dict[str, Any], tmp_path: Path
) -> None:
    folder = train(python, tmp_path, place, reward_model="judge", models={"reward_model": judge}, **LEARNING)
    reward = [values[0] for _, values in sorted(curve(folder, "reward").items())]
    held = curve(folder, "eval_reward")
    kl = [values[0] for _, values in sorted(curve(folder, "kl").items())]
    print(f"reward {reward[0]:.2f} → {sum(reward[-3:]) / 3:.2f}; held-out {held[0][0]:.2f} → {held[14][0]:.2f}")
    print(f"kl a token: at most {max(kl):.2f}")
    assert sum(reward[-3:]) / 3 > reward[0] + 1
    assert held[14][0] > held[0][0] + 1
    assert max(kl) < 1
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    right = {
        step: [each["answer"] == each["reference"] for each in answers if each["step"] == step] for step in (0, 14)
    }
    shares = {step: sum(found) / len(found) for step, found in right.items()}
    print(f"right answers to held-out questions {shares[0]:.0%} → {shares[14]:.0%}")
    assert shares[14] >= 0.8 > shares[0]


def test_the_reward_of_a_function_rises_in_full_tuning(python: Path, place: Path, tmp_path: Path) -> None:
    hyper = {**LEARNING, "tuning": "full", "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    folder = train(python, tmp_path, place, **hyper)
    reward = [values[0] for _, values in sorted(curve(folder, "reward_exact").items())]
    print(f"reward {reward[0]:.2f} → {sum(reward[-3:]) / 3:.2f}")
    assert sum(reward[-3:]) / 3 > reward[0] + 0.2
    assert not result_of(folder)["adapter"]
    # What training set for itself is not saved: the tokenizer still pads as the base does.
    for name in ("tokenizer_config.json", "generation_config.json"):
        left, base = (json.loads((each / name).read_text()) for each in (folder / "output", place / "taught"))
        for key in ("pad_token", "pad_token_id", "eos_token_id"):
            assert left.get(key) == base.get(key), (name, key)


def test_a_stronger_pull_keeps_the_actor_nearer_to_the_reference(python: Path, place: Path, tmp_path: Path) -> None:
    far = train(python, tmp_path / "far", place, **{**LEARNING, "kl_coeff": 0.0})
    near = train(python, tmp_path / "near", place, **{**LEARNING, "kl_coeff": 1.0})
    ends = [sum(curve(folder, "kl")[step][0] for step in (12, 13, 14)) / 3 for folder in (far, near)]
    print(f"kl a token with a coefficient of 0: {ends[0]:.2f}, of 1: {ends[1]:.2f}")
    assert ends[1] < ends[0] / 2


# --- the same whatever happens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "full"])
def whole(
    request: pytest.FixtureRequest, python: Path, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The parameters of a train that was left alone, and its job folder. Ten prompts: epochs begin inside an update."""
    given = {**SHORT, "tuning": request.param, "actor_learning_rate": 1e-3, "max_samples": 10}
    return given, train(python, tmp_path_factory.mktemp("whole") / "job", place, **given)


def test_every_curve_begins_at_the_first_step(whole: tuple[dict[str, Any], Path]) -> None:
    _, folder = whole
    names = (*CURVES, "reward_std", "reward_exact", "completion_length", "completion_clipped_share", "clip_ratio")
    names += ("critic_learning_rate", "critic_grad_norm", "value_clip_ratio", "tokens_per_second", "memory_gib")
    for name in names:
        assert sorted(curve(folder, name)) == [1, 2, 3, 4, 5, 6], name
    assert curve(folder, "kl")[1][0] == pytest.approx(0, abs=1e-4)
    assert curve(folder, "epoch")[6][0] == pytest.approx(4.8)


def test_a_resumed_train_is_the_uninterrupted_one(
    whole: tuple[dict[str, Any], Path], python: Path, place: Path, tmp_path: Path
) -> None:
    given, left_alone = whole
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    shutil.copytree(left_alone / "checkpoints" / "checkpoint-3", checkpoint)
    train(python, tmp_path, place, resume=checkpoint, **given)
    for name in CURVES:
        expected = {step: values for step, values in curve(left_alone, name).items() if step > 3}
        assert curve(tmp_path, name) == expected, name
    assert same_weights(left_alone, tmp_path)
    assert result_of(tmp_path)["loss"] == pytest.approx(result_of(left_alone)["loss"], rel=1e-6)
    assert result_of(tmp_path)["steps"] == 6


def test_a_cancelled_train_saves_a_checkpoint_and_goes_on_to_the_same(
    whole: tuple[dict[str, Any], Path], python: Path, place: Path, tmp_path: Path
) -> None:
    given, left_alone = whole
    rare = {**given, "checkpoint_steps": 100}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, python, tmp_path, place, **rare)
        assert wait_for(lambda: bool(curve(tmp_path, "loss")), 300, pause=0.01)
        signal_running(tmp_path)
        with pytest.raises(StageCancelled):
            running.result(300)
    (left,) = contract.complete_checkpoints(tmp_path / "checkpoints")
    step = int(left.name.removeprefix("checkpoint-"))
    assert 1 <= step < 6
    assert max(curve(tmp_path, "loss")) == step
    train(python, tmp_path, place, resume=left, **rare)
    assert curve(tmp_path, "loss") == curve(left_alone, "loss")
    assert same_weights(left_alone, tmp_path)


# --- every parameter reaches what it is for -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def observed(python: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the parameters of a case have become in the trainer; all of them are built in one process."""
    root = tmp_path_factory.mktemp("observed")
    folders = {name: root / name for name in CASES}
    functions = place / "functions.py"
    functions.write_text("def polite(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    for name, folder in folders.items():
        given = dict(CASES[name])
        if name == "reward_file":
            given["reward_file"] = str(functions)
        open_job(folder, job_of(folder, place, **given))
    program = Path(__file__).with_name("ppo_observer.py")
    command = [str(python), str(program), *map(str, folders.values())]
    subprocess.run(command, check=True, env=stage_environment())
    return lambda name: dict(json.loads((folders[name] / "observed.json").read_text()))


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "tuning": {"tuning": "full"},
    "lora_rank": {"lora_rank": 3},
    "lora_alpha": {"lora_alpha": 5},
    "lora_targets": {"lora_targets": "q_proj,v_proj"},
    "lora_nowhere": {"lora_targets": "queries"},
    "max_seq_length": {"max_seq_length": 40},
    "max_input_length": {"max_input_length": 20},
    "max_content_length": {"max_content_length": 7},
    "over_length": {"max_input_length": 20, "over_length": "truncate"},
    "max_samples": {"max_samples": 5},
    "max_grad_norm": {"max_grad_norm": 0.25},
    "max_grad_norm_0": {"max_grad_norm": 0},
    "epochs": {"epochs": 3},
    "max_steps": {"max_steps": 7},
    "batch_size": {"batch_size": 2},
    "grad_accum_steps": {"grad_accum_steps": 3},
    "lr_scheduler": {"lr_scheduler": "constant", "warmup_ratio": 0, "max_steps": 20},
    "lr_decay_ratio": {"lr_decay_ratio": 0.5, "warmup_ratio": 0, "max_steps": 20},
    "warmup_steps": {"warmup_steps": 4, "warmup_ratio": 0.5, "max_steps": 20},
    "warmup_ratio": {"warmup_ratio": 0.5, "max_steps": 20},
    "weight_decay": {"weight_decay": 0.3},
    "optimizer": {"optimizer": "sgd"},
    "checkpoint_steps": {"checkpoint_steps": 9},
    "evaluation_steps": {"evaluation_steps": 11},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "group_by_length": {"group_by_length": False, "batch_size": 2, "grad_accum_steps": 1},
    "grouped": {"batch_size": 2, "grad_accum_steps": 1},
    "seed": {"seed": 5},
    "dtype": {"dtype": "bfloat16", "tuning": "full"},
    "rewards": {"rewards": [{"name": "regex", "pattern": "a", "weight": 3}, {"name": "json"}]},
    "reward_file": {},
    "actor_learning_rate": {"actor_learning_rate": 3e-4},
    "critic_learning_rate": {"critic_learning_rate": 3e-4},
    "temperature": {"temperature": 0.4},
    "ppo_epochs": {"ppo_epochs": 2},
    "kl_coeff": {"kl_coeff": 0.3},
    "kl_estimator": {"kl_estimator": "k3"},
    "clip_range_ratio": {"clip_range_ratio": 0.1},
    "clip_range_value": {"clip_range_value": 0.4},
    "clip_range_score": {"clip_range_score": 3.0},
    "missing_end_penalty": {"missing_end_penalty": 1.5},
    "value_coeff": {"value_coeff": 0.7},
    "gamma": {"gamma": 0.9},
    "gae_lambda": {"gae_lambda": 0.8},
}
# The parameter, where it is seen, what is seen there.
SEEN: dict[str, tuple[str, object]] = {
    "lora_rank": ("adapter", [3, 6, None]),
    "lora_alpha": ("adapter", [8, 5, None]),
    "lora_targets": ("adapter", [8, 16, ["q_proj", "v_proj"]]),
    "max_content_length": ("response_length", 7),
    "max_samples": ("prompts", 5),
    "epochs": ("steps", 6),
    "max_steps": ("steps", 7),
    "batch_size": ("forward", [2, 2]),
    "grad_accum_steps": ("accumulated", 3),
    "weight_decay": ("decays", [0.3]),
    "optimizer": ("optimizer", "SGD"),
    "checkpoint_steps": ("save_steps", 9),
    "evaluation_steps": ("evaluation", 11),
    "gradient_checkpointing": ("checkpointing", [True, True]),
    "seed": ("seed", 5),
    "dtype": ("dtype", ["torch.bfloat16"]),
    "rewards": ("rewards", [["regex", 3.0], ["json", 1.0]]),
    "reward_file": ("rewards", [["polite", 1.0]]),
    "actor_learning_rate": ("actor_rates", [3e-4]),
    "critic_learning_rate": ("critic_rates", [3e-4]),
    "temperature": ("temperature", 0.4),
    "ppo_epochs": ("num_ppo_epochs", 2),
    "kl_coeff": ("kl_coef", 0.3),
    "kl_estimator": ("kl_estimator", "k3"),
    "clip_range_ratio": ("cliprange", 0.1),
    "clip_range_value": ("cliprange_value", 0.4),
    "clip_range_score": ("clip", 3.0),
    "missing_end_penalty": ("missing_eos_penalty", 1.5),
    "value_coeff": ("vf_coef", 0.7),
    "gamma": ("gamma", 0.9),
    "gae_lambda": ("lam", 0.8),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_parameter_reaches_its_place(observed: Callable[[str], dict[str, Any]], name: str) -> None:
    where, expected = SEEN[name]
    found, default = observed(name)[where], observed("default")[where]
    if where == "adapter" and isinstance(expected, list) and expected[2] is None:
        found, default, expected = found[:2], default[:2], expected[:2]
    assert found == expected
    assert default != expected


def test_tuning_decides_what_is_trained(observed: Callable[[str], dict[str, Any]]) -> None:
    lora, full = observed("default"), observed("tuning")
    assert lora["trained"] == ["default"]
    assert lora["critic_trained"] == ["default", "score"]
    assert not lora["reference"]  # it is the actor without its adapter
    assert {"q_proj", "norm"} <= set(full["trained"])
    assert {"q_proj", "score"} <= set(full["critic_trained"])
    assert full["reference"]
    assert "queries" in observed("lora_nowhere")["refused"]


def test_lengths_limit_prompts_and_answers(observed: Callable[[str], dict[str, Any]]) -> None:
    default = observed("default")
    assert default["longest"] > 20
    assert 0 < observed("max_input_length")["prompts"] < default["prompts"] == 60
    assert observed("max_input_length")["longest"] <= 20
    assert observed("over_length")["longest"] <= 20
    assert observed("over_length")["prompts"] == 60
    assert default["response_length"] == 512
    assert observed("max_seq_length")["response_length"] == min(20, 40 - observed("max_seq_length")["longest"])


def test_gradients_are_clipped_for_actor_and_critic_apart(observed: Callable[[str], dict[str, Any]]) -> None:
    assert observed("max_grad_norm")["clipped"] == pytest.approx([0.25, 0.25], rel=1e-3)
    assert observed("default")["clipped"] == pytest.approx([1, 1], rel=1e-3)
    assert min(observed("max_grad_norm_0")["clipped"]) > 5


def test_the_schedule_is_the_one_asked_for(observed: Callable[[str], dict[str, Any]]) -> None:
    assert observed("lr_scheduler")["rates"] == [1.0] * 20
    floor = observed("lr_decay_ratio")["rates"]
    assert floor[-1] == pytest.approx(0.5 + 0.5 * 0.05)
    assert observed("warmup_steps")["rates"].index(1.0) == 4
    assert observed("warmup_ratio")["rates"].index(1.0) == 10
    assert math.isclose(observed("warmup_ratio")["rates"][5], 0.5)


def test_the_order_of_prompts_follows_from_its_parameters(observed: Callable[[str], dict[str, Any]]) -> None:
    default = observed("default")
    assert observed("seed")["orders"] != default["orders"]
    assert observed("gamma")["orders"] == default["orders"]
    assert observed("group_by_length")["padding"] > observed("grouped")["padding"]
    assert default["update"] == 32
    assert observed("batch_size")["update"] == 8
    assert observed("grad_accum_steps")["update"] == 24


def test_no_parameter_is_left_out() -> None:
    by_the_tokenizer = {"thinking", "chat_template_kwargs"}  # chat.training_tokenizer reads them: test_chat_template.py
    tested = {*CASES, "keep_checkpoints", "reward_model"} | by_the_tokenizer
    assert tested >= {*METHOD.hyperparameter_names, *METHOD.parameters}


def test_only_so_many_checkpoints_are_kept(python: Path, place: Path, tmp_path: Path) -> None:
    folder = train(python, tmp_path, place, **{**SHORT, "max_steps": 3, "keep_checkpoints": 2})
    assert [path.name for path in contract.complete_checkpoints(folder / "checkpoints")] == [
        "checkpoint-2",
        "checkpoint-3",
    ]

"""From files, presets, copies and the command line to one configuration with origins."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.errors import UserError
from configs.resolve import (
    Preset,
    ResolvedTrain,
    describe,
    effective,
    find_preset,
    list_presets,
    resolve_train,
)
from configs.strict_yaml import read_yaml
from configs.train import Hyperparameters, TrainConfig
from tests.own_methods import install_method

BASE = "name: a\nbase_model: b\ndataset: c\n"
MINE = BASE + "method: mine\n"
OWN: dict[str, Any] = {
    "beta": {"type": "number", "exclusiveMinimum": 0, "default": 0.1},
    "steps": {"type": "integer", "minimum": 1, "default": 3},
    "text": {"type": "string", "default": "yes"},
    "switch": {"type": "boolean", "default": False},
    "kind": {"type": "string", "enum": ["sigmoid", "hinge"], "default": "sigmoid"},
    "nested": {"type": "object", "default": {}},
    "rewards": {"type": "string", "format": "path", "default": None},
}


def own_method(**changes: Any) -> None:
    """The method `mine`, with parameters of its own and other defaults than the common ones."""
    common = {"unused": ["num_generations"], "defaults": {"learning_rate": 1e-6}, "choices": {"tuning": ["lora"]}}
    install_method(**{"parameters": OWN, "hyperparameters": common, **changes})


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def written(tmp_path: Path, text: str | bytes, name: str = "train.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def resolve(tmp_path: Path, text: str, *overrides: str, **options: Any) -> ResolvedTrain:
    return resolve_train(written(tmp_path, text), overrides, **options)


def refusal(tmp_path: Path, text: str | bytes, *overrides: str, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve_train(written(tmp_path, text), overrides, **options)
    return caught.value


# Each row of the tables in the seed documents: spelling, example value, canonical field, resolved value.
SEED_ROWS: list[tuple[str, str, str, object]] = [
    # DeepExtension, parameter reference table (English and Chinese)
    ("Base Model", "Qwen1.5-7B", "base_model", "Qwen1.5-7B"),
    ("MODEL_PATH", "LLaMA2", "base_model", "LLaMA2"),
    ("Dataset", "d", "dataset", "d"),
    ("DATASET_PATH", "d", "dataset", "d"),
    ("LORA_RANK", "16", "lora_rank", 16),
    ("LOAD_IN_4BIT", "true", "load_in_4bit", True),
    ("MAX_SEQ_LENGTH", "2048", "max_seq_length", 2048),
    ("MAX_INPUT_LENGTH", "256", "max_input_length", 256),
    ("MAX_CONTENT_LENGTH", "256", "max_content_length", 256),
    ("MAX_SAMPLES", "-1", "max_samples", -1),
    ("NUM_GENERATIONS", "4", "num_generations", 4),
    ("MAX_GRAD_NORM", "0.5", "max_grad_norm", 0.5),
    ("EPOCHS", "3", "epochs", 3.0),
    ("MAX_STEPS", "500", "max_steps", 500),
    ("MAX_STEPS", "-1", "max_steps", None),
    ("BATCH_SIZE", "4", "batch_size", 4),
    ("GRAD_ACCUM_STEPS", "2", "grad_accum_steps", 2),
    ("LEARNING_RATE", "5e-5", "learning_rate", 5e-5),
    ("WARMUP_STEPS", "10", "warmup_steps", 10),
    ("WARMUP_RATIO", "0.05", "warmup_ratio", 0.05),
    ("PromptInputColumn", "question", "prompt_column", "question"),
    ("PromptOutputColumn", "answer", "completion_column", "answer"),
    # Huawei Pangu, supervised fine-tuning
    ("训练类型", "有监督微调", "method", "sft"),
    ("训练方式", "全量微调", "tuning", "full"),
    ("训练方式", "局部微调", "tuning", "lora"),
    ("训练方式", "局部微调(LoRA)", "tuning", "lora"),
    ("训练方式", "局部微调（LoRA）", "tuning", "lora"),
    ("训练模型", "盘古", "base_model", "盘古"),
    ("训练数据集", "d", "dataset", "d"),
    ("数据集", "d", "dataset", "d"),
    ("验证数据", "v", "validation_dataset", "v"),
    ("验证数据集", "v", "validation_dataset", "v"),
    ("名称", "客服", "name", "客服"),
    ("描述", "说明", "description", "说明"),
    ("数据批量大小", "4", "batch_size", 4),
    ("训练轮数", "6", "epochs", 6.0),
    ("学习率", "0.000003", "learning_rate", 3e-6),
    ("优化器", "adamw", "optimizer", "adamw"),
    ("学习率衰减比率", "0.00001", "lr_decay_ratio", 1e-5),
    ("热身比例", "0.1", "warmup_ratio", 0.1),
    ("模型保存步数", "1000", "checkpoint_steps", 1000),
    ("LoRA轶值", "32", "lora_rank", 32),
    ("LoRA秩", "32", "lora_rank", 32),
    # Baidu Qianfan, Baichuan2-7B-Chat and the words of training
    ("训练方法", "全量更新", "tuning", "full"),
    ("训练方法", "LoRA", "tuning", "lora"),
    ("迭代轮次", "2", "epochs", 2.0),
    ("训练轮次", "2", "epochs", 2.0),
    ("Epoch", "2", "epochs", 2.0),
    ("批处理大小", "4", "batch_size", 4),
    ("数据批", "4", "batch_size", 4),
    ("Batch_size", "4", "batch_size", 4),
    ("Batchsize", "4", "batch_size", 4),
    ("Learning rate", "1e-5", "learning_rate", 1e-5),
    ("LR", "1e-5", "learning_rate", 1e-5),
    ("学习率调整计划", "linear", "lr_scheduler", "linear"),
    ("学习率预热步数占比", "0.05", "warmup_ratio", 0.05),
    ("权重衰减数值", "0.01", "weight_decay", 0.01),
    ("loraRank", "32", "lora_rank", 32),
    ("loraAlpha", "32", "lora_alpha", 32),
    ("loraDropout", "0.1", "lora_dropout", 0.1),
    ("序列长度", "4096", "max_seq_length", 4096),
]


def value_of(config: TrainConfig, name: str) -> object:
    return getattr(config.hyperparameters if name in Hyperparameters.model_fields else config, name)


def without(name: str) -> str:
    required = {"name": "a", "base_model": "b", "dataset": "c"}
    return "".join(f"{key}: {value}\n" for key, value in required.items() if key != name)


@pytest.mark.parametrize(("spelling", "text", "name", "expected"), SEED_ROWS)
def test_documented_spelling_resolves_in_a_file_and_on_the_command_line(
    tmp_path: Path, spelling: str, text: str, name: str, expected: object
) -> None:
    in_file = resolve(tmp_path, f"{without(name)}{spelling}: {text}\n")
    on_line = resolve(tmp_path, without(name), f"{spelling}={text}")
    assert value_of(in_file.config, name) == expected
    assert value_of(on_line.config, name) == expected
    dotted = f"hyperparameters.{name}" if name in Hyperparameters.model_fields else name
    assert in_file.origins[dotted].startswith("file ")
    assert on_line.origins[dotted] == "command line"


@pytest.mark.parametrize("name", [*Hyperparameters.model_fields])
def test_every_hyperparameter_has_camel_upper_and_kebab_case(tmp_path: Path, name: str) -> None:
    value = {"lora_alpha": 4, "max_input_length": 64, "max_content_length": 64, "max_steps": 3}.get(
        name, Hyperparameters.model_fields[name].get_default(call_default_factory=True)
    )
    value = "eval_loss" if name == "keep_best" else 7 if value is None else value
    first, *rest = name.split("_")
    for spelling in (name.upper(), first + "".join(word.title() for word in rest), name.replace("_", "-")):
        resolved = resolve(tmp_path, f"{BASE}{spelling}: {value}\nvalidation_split: 0.1\n")
        assert value_of(resolved.config, name) == value
        assert resolved.origins[f"hyperparameters.{name}"].endswith("train.yaml:4")


def test_output_dir_and_model_type_are_accepted_and_said_to_have_no_effect(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, BASE + "OUTPUT_DIR: /x\n模型类型: LLM\n")
    assert len(resolved.warnings) == 2
    assert "OUTPUT_DIR" in resolved.warnings[0]
    assert "train.yaml:4" in resolved.warnings[0]
    assert "system" in resolved.warnings[0]


# ---- YAML


def test_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    values = read_yaml(written(tmp_path, "a: 1e-4\nb: 010\nc: no\nd: 12:30\ne: 2024-01-01\nf: .5\ng: null\n")).values
    assert values == {"a": 1e-4, "b": 10, "c": "no", "d": "12:30", "e": "2024-01-01", "f": 0.5, "g": None}


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert resolve_train(path).config.name == "a"


YAML_MISTAKES: list[tuple[str | bytes, int | None, str]] = [
    ("", None, "empty"),
    ("# only a comment\n", None, "empty"),
    ("- a\n", 1, "list"),
    ("just text\n", 1, "plain text"),
    ("a: 1\nb: 2\na: 3\n", 3, "`a` stands twice, on line 1 and on line 3"),
    ("hyperparameters:\n  seed: 1\n  seed: 1\n", 3, "`seed` stands twice"),
    ("a:\n\tb: 1\n", 2, "indent with spaces"),
    ("a: [1, 2\nb: 3\n", 2, "not YAML"),
    ("a: 'x\n", 2, "not YAML"),
    ("a: 1\n---\nb: 1\n", 2, "another document"),
    ("学习率：0.1\n", 1, "half-width"),
    (b"name: \xc4\xe3\n", 1, "not UTF-8"),
    ("name: 你\n".encode("utf-16"), 1, "not UTF-8"),
    ("a: 1\nb: \x01\n", 2, "U+0001"),
    ("a: !!python/object/apply:os.getcwd []\n", 1, "tag"),
    ("a: 1\n5: x\n", 2, "must be text"),
    ("a: &a [*a]\n", 1, "nested too deeply"),
    ("[" * 5000, None, "nested too deeply"),
    (b"a: " + b"x" * (1 << 20), None, "1 MiB"),
]


@pytest.mark.parametrize(("text", "line", "told"), YAML_MISTAKES)
def test_each_yaml_mistake_is_told_with_file_and_line(
    tmp_path: Path, text: str | bytes, line: int | None, told: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.file == str(tmp_path / "train.yaml")
    assert error.line == line
    assert told in str(error)


def test_column_of_a_syntax_error_is_told(tmp_path: Path) -> None:
    assert "line 1, column 5" in str(refusal(tmp_path, "a: b: c\n"))


def test_alias_bomb_and_bracket_flood_end_early(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    flood = "a: [" + "1," * 500_000 + "1]\n"
    started = time.monotonic()
    assert "20000 values" in str(refusal(tmp_path, bomb))
    assert "20000 values" in str(refusal(tmp_path, flood))
    assert time.monotonic() - started < 10


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        resolve_train(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="folder"):
        resolve_train(tmp_path)


def test_dataset_given_as_train_file_is_recognised(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a"}\n{"prompt": "b"}\n', "rows.jsonl")
    with pytest.raises(UserError, match="is this a dataset"):
        resolve_train(path)


# ---- names and values


def test_two_spellings_with_different_values_name_both_and_their_lines(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "LORA_RANK: 8\nhyperparameters:\n  LoRA秩: 16\n")
    for part in ("LORA_RANK", "train.yaml:4", "LoRA秩", "train.yaml:6", "8", "16"):
        assert part in str(error)


def test_two_spellings_with_one_value_are_fine(tmp_path: Path) -> None:
    text = BASE + "LEARNING_RATE: 1e-5\n学习率: 0.00001\n训练方式: LoRA\ntuning: lora\nMAX_STEPS: -1\nmaxSteps:\n"
    resolved = resolve(tmp_path, text)
    assert resolved.config.hyperparameters.learning_rate == 1e-5
    assert resolved.config.hyperparameters.max_steps is None


def test_two_overrides_of_one_parameter_that_differ_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE, "lora_rank=8", "LORA_RANK=16")
    assert "lora_rank (command line)" in str(error)
    assert "LORA_RANK (command line)" in str(error)


def test_unknown_parameter_is_told_with_line_and_nearest_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "learning_rat: 1e-5\n")
    assert error.line == 4
    assert error.field == "learning_rat"
    assert "did you mean learning_rate" in str(error.mend)


def test_unknown_override_is_told_with_nearest_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE, "hyperparameters.lora_ranks=3")
    assert "command line" in str(error)
    assert "lora_rank" in str(error.mend)


def test_train_field_inside_of_hyperparameters_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "top level" in str(refusal(tmp_path, BASE + "hyperparameters:\n  through: complete\n").mend)


def test_all_problems_are_told_in_one_message(tmp_path: Path) -> None:
    text = "name: a/b\nbase_model: 3\nbatch_size: 0\nlearning_rat: 1\nhyperparameters:\n  lr_scheduler: cosin\n"
    message = str(refusal(tmp_path, text, "epochs=many"))
    assert message.startswith("6 problems") or message.startswith("7 problems")
    for part in (
        "train.yaml:1",
        "train.yaml:2",
        'put it in quotes: "3"',
        "a whole number ≥ 1",
        "learning_rate",
        "train.yaml:6",
        "one of linear, cosine",
        "'many'",
        "dataset",
    ):
        assert part in message


def test_impossible_value_tells_file_line_field_value_and_expected(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "学习率: 7\n")
    assert (error.line, error.value) == (4, 7)
    assert error.field == "hyperparameters.learning_rate (written 学习率)"
    assert error.expected == "a number > 0 and ≤ 1"


def test_value_left_empty_is_told(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "learning_rate:\n")
    assert error.problem == "no value is given"
    assert error.line == 4


def test_contradiction_names_both_places(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "训练方式: 全量微调\n", "load_in_4bit=true")
    assert "train.yaml:4" in str(error)
    assert "load_in_4bit (command line)" in str(error)
    assert "tuning: lora" in str(error.mend)


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "是", "1"])
def test_switch_is_read_from_text(tmp_path: Path, text: str) -> None:
    assert resolve(tmp_path, BASE, f"load_in_4bit={text}").config.hyperparameters.load_in_4bit is True


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "否", "0"])
def test_switch_is_turned_off_by_text(tmp_path: Path, text: str) -> None:
    assert resolve(tmp_path, BASE, f"group_by_length={text}").config.hyperparameters.group_by_length is False


def test_text_on_the_command_line_stays_as_typed(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, BASE, "name=007", "description=see #3: [x]", "prompt_column=no", "through=null")
    assert (resolved.config.name, resolved.config.description) == ("007", "see #3: [x]")
    assert resolved.config.prompt_column == "no"
    assert resolved.config.through is None


def test_override_without_equals_sign_is_told(tmp_path: Path) -> None:
    assert "name=value" in str(refusal(tmp_path, BASE, "lora_rank"))


def test_group_is_not_set_as_a_whole_on_the_command_line(tmp_path: Path) -> None:
    assert "one by one" in str(refusal(tmp_path, BASE, "hyperparameters=3").mend)
    own_method()
    assert "nothing inside" in str(refusal(tmp_path, MINE, "method_params.steps=1", "method_params.steps.b=2"))


# ---- parameters of a method


def test_parameters_of_the_method_are_filled_up_with_its_defaults(tmp_path: Path) -> None:
    own_method()
    resolved = resolve(tmp_path, MINE + "method_params:\n  beta: 1\n  nested: {a: 1}\n", "nested.b=[1, 2]", "TEXT=007")
    own = {"beta": 1.0, "steps": 3, "text": "007", "switch": False, "kind": "sigmoid", "rewards": None}
    assert resolved.config.method_params == own | {"nested": {"a": 1, "b": [1, 2]}}
    assert list(resolved.config.method_params) == list(OWN)
    origins = {name: resolved.origins[f"method_params.{name}"] for name in ("beta", "steps", "text", "nested")}
    assert origins.pop("beta").endswith("train.yaml:6")
    assert origins == {"steps": "default", "text": "command line", "nested": "command line"}


@pytest.mark.parametrize("spelling", ["beta", "method_params.beta", "BETA", "hyperparameters.beta"])
def test_a_parameter_of_the_method_needs_no_group(tmp_path: Path, spelling: str) -> None:
    own_method()
    on_line = resolve(tmp_path, MINE, f"{spelling}=0.2")
    *group, name = spelling.split(".")
    in_file = resolve(tmp_path, MINE + (f"{group[0]}: {{{name}: 0.2}}" if group else f"{name}: 0.2") + "\n")
    assert on_line.config.method_params["beta"] == in_file.config.method_params["beta"] == 0.2
    assert in_file.origins["method_params.beta"].endswith("train.yaml:5")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "beta: 0",
            "train.yaml:5: this value is impossible\n  field: method_params.beta = 0\n  expected: a number > 0",
        ),
        ("beta: .inf", "expected: a number > 0"),
        ("beta: true", "expected: a number > 0"),
        ("beta:", "expected: a number > 0"),
        ("steps: 2.5", "expected: a whole number ≥ 1"),
        ("steps: [1]", "field: method_params.steps = [1]"),
        ("text: 12", 'to mend: put it in quotes: "12"'),
        ("kind: hing", "expected: one of sigmoid, hinge"),
        ("method_params: {betta: 1}", "the method mine has no such parameter of its own"),
        ("betta: 1", "to mend: did you mean beta?"),
        ("rewards: none.py", "train.yaml:5: there is no such file\n  field: method_params.rewards = 'none.py'"),
        ("num_generations: 3", "the method mine has no use for this parameter, so nothing would read it"),
        ("tuning: full", "the method mine does not take this value"),
    ],
)
def test_what_the_method_cannot_take_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    own_method()
    assert told in str(refusal(tmp_path, MINE + text + "\n"))


@pytest.mark.parametrize("override", ["beta=0", "method_params.beta=x", "steps=2.5", "kind=hing", "method_params.b=1"])
def test_the_command_line_is_checked_as_well(tmp_path: Path, override: str) -> None:
    own_method()
    assert "(command line)" in str(refusal(tmp_path, MINE, override))


def test_what_the_method_cannot_take_is_told_together_with_the_rest(tmp_path: Path) -> None:
    own_method()
    told = str(refusal(tmp_path, MINE + "beta: -1\nnum_generations: 9\nlora_rank: 0\ntuning: half\n"))
    assert "4 problems" in told
    assert all(f"train.yaml:{line}" in told for line in (5, 6, 7, 8))


@pytest.mark.parametrize(
    ("technique", "through", "refused"),
    [
        ("prompt_tuning", "complete", True),
        ("llama_adapter", "deployed", True),
        ("prompt_tuning", "customized", False),
        ("ia3", "deployed", False),
    ],
)
def test_a_train_goes_no_further_than_what_its_parameters_leave_can(
    technique: str, through: str, refused: bool
) -> None:
    given = ["name=t", "base_model=smollm2-135m-instruct", "dataset=rows", "method=peft"]
    given += [f"technique={technique}", f"through={through}"]
    if not refused:
        assert resolve_train(None, given).config.through == through
        return
    with pytest.raises(
        UserError, match=f"what is trained with technique {technique} cannot be made a complete"
    ) as told:
        resolve_train(None, given)
    assert (told.value.field, told.value.value) == ("through (command line)", through)
    assert "tuneline deploy MODEL --target custom" in str(told.value)


def test_a_required_parameter_that_is_not_given_is_told(tmp_path: Path) -> None:
    own_method(parameters={"reward_model": {"type": "string", "format": "model", "required": True}})
    told = "a required parameter is missing\n  field: method_params.reward_model\n  expected: a registered model"
    assert told in str(refusal(tmp_path, MINE))
    assert resolve(tmp_path, MINE, "reward_model=judge@champion").config.method_params == {
        "reward_model": "judge@champion"
    }


def test_an_unused_hyperparameter_may_stand_there_with_its_default_and_is_not_described(tmp_path: Path) -> None:
    own_method()
    resolved = resolve(tmp_path, MINE + "num_generations: 2\n")
    assert "hyperparameters.num_generations" not in {name for name, _, _ in describe(resolved)}
    assert "num_generations" not in effective(resolved.config)["hyperparameters"]


def test_the_methods_own_default_lies_between_the_common_one_and_a_preset(tmp_path: Path) -> None:
    own_method()
    alone, preset = resolve(tmp_path, MINE), resolve(tmp_path, MINE, preset="nl2json")
    name = "hyperparameters.learning_rate"
    assert (alone.config.hyperparameters.learning_rate, alone.origins[name]) == (1e-6, "method mine")
    assert preset.origins[name] == "preset nl2json"
    assert alone.warnings == []


READY: dict[str, Any] = {
    "name": "ready",
    "base_model": "b",
    "dataset": "samples/commands_en/train.jsonl",
    "validation_dataset": "samples/commands_en/validation.jsonl",
    "max_new_tokens": 64,
}


def test_a_ready_method_needs_nothing_else(tmp_path: Path) -> None:
    own_method(train=READY, hyperparameters={"defaults": {"evaluation_steps": 5}})
    resolved = resolve_train(overrides=["method=mine"])
    assert (resolved.config.name, resolved.config.base_model, resolved.config.max_new_tokens) == ("ready", "b", 64)
    assert Path(resolved.config.dataset).is_file()
    assert {resolved.origins[name] for name in READY} == {"method mine"}
    assert resolve_train(overrides=["method=mine", "name=other"]).config.name == "other"


def test_other_rows_are_not_validated_on_those_of_the_method(tmp_path: Path) -> None:
    own_method(train=READY, hyperparameters={"defaults": {"evaluation_steps": 5}})
    resolved = resolve_train(overrides=["method=mine", "dataset=c"])
    assert (resolved.config.dataset, resolved.config.validation_dataset) == ("c", None)
    assert resolved.config.max_new_tokens == 64
    assert resolved.warnings == []  # nobody has asked for evaluation_steps
    assert resolve_train(overrides=["method=mine", "dataset=c", "validation_split=0.1"]).config.validation_split == 0.1


def test_a_method_without_customized_models_trains_in_full(tmp_path: Path) -> None:
    stage = {"file": "training.py", "environment": "host"}
    stages = {"training": stage, "saving": stage}
    own_method(lifecycle=["complete"], stages=stages, hyperparameters={"unused": ["tuning"]})
    resolved = resolve(tmp_path, MINE)
    assert resolved.config.hyperparameters.tuning == "full"
    assert effective(resolved.config)["through"] == "complete"
    assert "has no use" in str(refusal(tmp_path, MINE + "tuning: lora\n"))


def test_a_file_is_found_beside_the_train_file_and_made_absolute(tmp_path: Path) -> None:
    own_method()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "rewards.py").touch()
    path = written(tmp_path, MINE + "rewards: rewards.py\n", "beside/train.yaml")
    assert resolve_train(path).config.method_params["rewards"] == str(tmp_path / "beside" / "rewards.py")


def test_a_copy_for_another_method_leaves_out_what_that_one_cannot_read(tmp_path: Path) -> None:
    own_method()
    first = resolve(tmp_path, BASE + "num_generations: 5\n")
    copied = resolve_train(None, ["method=mine"], copied=first.config.model_dump(mode="json"), copied_from="one")
    assert copied.config.hyperparameters.num_generations == 2
    assert [each for each in copied.warnings if "num_generations" in each and "5" in each]
    mine = resolve(tmp_path, MINE + "beta: 3\n")
    back = resolve_train(None, ["method=sft"], copied=mine.config.model_dump(mode="json"), copied_from="two")
    assert back.config.method_params == {}
    assert [each for each in back.warnings if "beta" in each and "3.0" in each]


def test_an_unknown_method_is_told_with_its_line(tmp_path: Path) -> None:
    told = str(refusal(tmp_path, BASE + "method: sftt\n"))
    assert "train.yaml:4: no such training method" in told
    assert "did you mean sft?" in told


# ---- origins and precedence


def test_later_origins_win_and_every_value_has_one(tmp_path: Path) -> None:
    copied = {"name": "old", "base_model": "b", "dataset": "c", "hyperparameters": {"epochs": 9, "seed": 9}}
    text = "name: new\npreset: nl2json\nseed: 10\n"
    before = copy.deepcopy(copied)
    resolved = resolve(tmp_path, text, "lora_rank=16", "warmup_ratio=0.2", copied=copied)
    hyper, origins = resolved.config.hyperparameters, resolved.origins
    assert (hyper.lr_decay_ratio, origins["hyperparameters.lr_decay_ratio"]) == (0.01, "preset nl2json")
    assert (hyper.epochs, origins["hyperparameters.epochs"]) == (9, "copied from old")
    assert (hyper.seed, origins["hyperparameters.seed"]) == (10, f"file {tmp_path / 'train.yaml'}:3")
    assert (hyper.warmup_ratio, origins["hyperparameters.warmup_ratio"]) == (0.2, "command line")
    assert origins["hyperparameters.logging_steps"] == "default"
    assert (resolved.config.name, origins["dataset"]) == ("new", "copied from old")
    names = {f"hyperparameters.{name}" for name in Hyperparameters.model_fields}
    assert set(origins) == names | set(TrainConfig.model_fields) - {"hyperparameters", "method_params"}
    assert copied == before
    assert any("does not change copied values (epochs)" in warning for warning in resolved.warnings)


def test_override_inside_of_a_copied_mapping_leaves_the_copied_one_alone() -> None:
    own_method()
    given = {"name": "a", "base_model": "b", "dataset": "c", "method": "mine"}
    copied: dict[str, Any] = given | {"method_params": {"nested": {"a": 1}}}
    resolved = resolve_train(copied=copied, overrides=["method_params.nested.a=2"])
    assert resolved.config.method_params["nested"] == {"a": 2}
    assert copied["method_params"] == {"nested": {"a": 1}}


def test_resolved_configuration_copies_to_itself(tmp_path: Path) -> None:
    own_method()
    first = resolve(tmp_path, MINE + "LORA_RANK: 16\nmethod_params: {beta: 1}\n")
    again = resolve_train(copied=first.config.model_dump(mode="json"), copied_from="run-1")
    assert again.config == first.config
    assert set(again.origins.values()) == {"copied from run-1"}


def test_preset_argument_wins_over_the_file(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, BASE + "preset: nl2json\n", preset="basic")
    assert resolved.config.hyperparameters.epochs == 4
    assert resolved.origins["hyperparameters.epochs"] == "preset basic"


def test_unknown_preset_is_told_with_line_and_nearest(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE + "preset: nl2jso\n")
    assert error.line == 4
    assert "nl2json" in str(error.mend)


PRESET_VALUES = {
    "basic": (8, 4, 7.5e-5, 0.067, 0.01),
    "nl2sql": (8, 4, 1e-5, 0.067, 0.013),
    "nl2json": (8, 3, 7.5e-5, 0.01, 0.01),
    "nl2code": (8, 4, 1e-5, 0.067, 0.013),
    "basic-low-rate": (8, 6, 3e-6, 0.01, 0.05),
    "basic-full": (8, 1, 1e-4, 1e-5, 0.1),
    "basic-lora": (8, 4, 1e-4, 0.1, 0.01),
    "nl2sql-lora": (8, 4, 1e-4, 0.1, 0.01),
    "nl2json-lora": (8, 3, 1e-4, 0.1, 0.01),
    "nl2code-lora": (8, 4, 1e-4, 0.1, 0.01),
}
OF_MODELS = {
    "baichuan2-7b-chat",
    "ernie-speed-full",
    "ernie-speed-lora",
    "ernie-bot-turbo-prompt-tuning",
    "codellama-7b-lora",
}
OF_EXAMPLES = {"qianfan-dpo", "qianfan-post-pretrain", "quick-start", "sft-demo"}


@pytest.mark.parametrize("name", [*PRESET_VALUES])
def test_preset_holds_the_documented_values(tmp_path: Path, name: str) -> None:
    hyper = resolve(tmp_path, BASE, preset=name).config.hyperparameters
    found = (hyper.batch_size, hyper.epochs, hyper.learning_rate, hyper.lr_decay_ratio, hyper.warmup_ratio)
    assert found == PRESET_VALUES[name]
    assert hyper.optimizer == "adamw"
    assert hyper.checkpoint_steps == (1000 if name in ("basic-low-rate", "basic-full") else 100)


def test_every_preset_resolves_and_names_its_source(tmp_path: Path) -> None:
    presets = list_presets()
    assert {*PRESET_VALUES, *OF_MODELS, *OF_EXAMPLES} == set(presets)
    for name, preset in presets.items():
        assert all(preset.source_of(value) for value in preset.values)
        resolved = resolve(tmp_path, BASE, preset=name)
        given = {key for key, origin in resolved.origins.items() if origin == f"preset {name}"}
        assert len(given) == len(preset.values)


def test_scene_of_the_seed_document_chooses_the_preset(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, BASE + "应用场景: NL2JSON场景\n训练方式: 全量微调\n")
    assert resolved.origins["hyperparameters.epochs"] == "preset nl2json"
    assert resolved.warnings == []


def test_preset_used_for_another_tuning_is_said(tmp_path: Path) -> None:
    warning = resolve(tmp_path, BASE, preset="nl2json").warnings[0]
    assert "documented for tuning full" in warning
    assert "preset nl2json-lora is for it" in warning
    assert "is for it" not in resolve(tmp_path, BASE, "tuning=lora", preset="ernie-speed-full").warnings[0]


def test_values_of_a_preset_come_from_the_documents_it_names() -> None:
    scene, tuning = find_preset("NL2SQL场景"), find_preset("nl2sql-lora")
    assert scene[1].path.stem == "nl2sql"
    assert "NL2SQL" in tuning[0].source_of("epochs")
    assert tuning[0].source_of("epochs") == scene[0].source_of("epochs")
    assert tuning[0].source_of("learning_rate") == find_preset("basic-lora")[0].source
    with pytest.raises(ValidationError, match="names no value: lora_rank"):
        Preset(title="t", source="s", sources={"lora_rank": "another"}, values={"epochs": 1})


# ---- warnings


def test_defaults_give_no_warning(tmp_path: Path) -> None:
    assert resolve(tmp_path, BASE).warnings == []


def test_untypical_value_is_accepted_with_range_source_and_origin(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, BASE + "MAX_STEPS: 10\n", "batch_size=65")
    steps, batch = sorted(resolved.warnings, reverse=True)
    for part in ("max_steps = 10", "100 to 50000", "DeepExtension", "train.yaml:4"):
        assert part in steps
    for part in ("batch_size = 65", "1 to 64", "command line"):
        assert part in batch


def test_overridden_parameters_are_said(tmp_path: Path) -> None:
    text = BASE + "EPOCHS: 3\nMAX_STEPS: 100\nWARMUP_STEPS: 5\nWARMUP_RATIO: 0.1\n"
    warnings = resolve(tmp_path, text).warnings
    assert any(item.startswith("max_steps = 100") and "overrides epochs = 3" in item for item in warnings)
    assert any(item.startswith("warmup_steps = 5") and "overrides warmup_ratio = 0.1" in item for item in warnings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tuning: full\nlora_rank: 16\n", "lora_rank has no effect"),
        ("lr_scheduler: constant\nlr_decay_ratio: 0.1\n", "lr_decay_ratio has no effect"),
        ("lr_scheduler: constant\nwarmup_steps: 5\n", "warm-up has no effect"),
        ("evaluation_steps: 5\n", "evaluation_steps has no effect"),
        ("early_stopping_threshold: 0.1\n", "early_stopping_threshold has no effect"),
        ("max_steps: 100\nwarmup_steps: 100\n", "never ends"),
    ],
)
def test_parameter_without_effect_is_said(tmp_path: Path, text: str, told: str) -> None:
    warnings = resolve(tmp_path, BASE + text).warnings
    assert len(warnings) == 1
    assert told in warnings[0]


# ---- paths, derived values, printing


def test_existing_dataset_is_found_beside_the_file_then_in_the_working_folder(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (tmp_path / "both.jsonl").write_text("{}")
    (folder / "both.jsonl").write_text("{}")
    (tmp_path / "here.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = "name: a\nbase_model: model\ndataset: both.jsonl\nvalidation_dataset: here.jsonl\n"
    path = written(folder, text + "evaluation_dataset: registered\n")
    config = resolve_train(path).config
    assert config.dataset == str(folder / "both.jsonl")
    assert config.validation_dataset == str(tmp_path / "here.jsonl")
    assert config.evaluation_dataset == "registered"
    assert config.base_model == str(tmp_path / "model")
    assert resolve_train(path, ["dataset=both.jsonl"]).config.dataset == str(tmp_path / "both.jsonl")


def test_folder_without_config_stays_a_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert resolve(tmp_path, BASE).config.base_model == "b"


def test_effective_spells_out_derived_values(tmp_path: Path) -> None:
    config = resolve(tmp_path, BASE + "lora_rank: 16\n").config
    assert config.hyperparameters.lora_alpha is None
    values = effective(config)
    assert (values["hyperparameters"]["lora_alpha"], values["through"]) == (32, "customized")
    assert values["hyperparameters"]["dtype"] == "auto"
    assert effective(resolve(tmp_path, BASE + "tuning: full\n").config)["through"] == "complete"


def test_description_lists_every_value_with_its_origin(tmp_path: Path) -> None:
    own_method(hyperparameters={})
    resolved = resolve(tmp_path, MINE + "lora_rank: 16\nmethod_params: {nested: {b: 1}}\n", "seed=1")
    rows = {name: (value, origin) for name, value, origin in describe(resolved)}
    assert rows["hyperparameters.lora_alpha"] == ("32", "derived: 2 × lora_rank")
    assert rows["through"] == ("customized", "derived from tuning")
    assert rows["hyperparameters.seed"] == ("1", "command line")
    assert rows["hyperparameters.max_steps"] == ("not set", "default")
    assert rows["hyperparameters.load_in_4bit"] == ("false", "default")
    assert rows["method_params.nested.b"] == ("1", f"file {tmp_path / 'train.yaml'}:6")
    assert {f"hyperparameters.{name}" for name in Hyperparameters.model_fields} <= set(rows)

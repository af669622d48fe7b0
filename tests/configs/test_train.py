"""The models of a train: what is impossible, what contradicts, and the table made from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.aliases import SPELLINGS, spelling_key
from configs.reference import fields_of, is_typical, limits_of, parameter_table, typical_of
from configs.train import Hyperparameters, TrainConfig, effective_through, path_of

REQUIRED = {"name": "a", "base_model": "b", "dataset": "c"}


def train(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({**REQUIRED, **values})


IMPOSSIBLE = [
    ("lora_rank", 0),
    ("lora_rank", 8.5),
    ("lora_alpha", 0),
    ("lora_dropout", 1.0),
    ("lora_targets", []),
    ("lora_targets", "../x"),
    ("max_seq_length", 1),
    ("max_input_length", 0),
    ("max_samples", 0),
    ("max_samples", -2),
    ("num_generations", 0),
    ("max_grad_norm", -0.1),
    ("epochs", 0),
    ("epochs", float("inf")),
    ("max_steps", 0),
    ("batch_size", 0),
    ("batch_size", True),
    ("grad_accum_steps", 0),
    ("learning_rate", 0),
    ("learning_rate", 1.1),
    ("learning_rate", float("nan")),
    ("lr_scheduler", "cosin"),
    ("lr_decay_ratio", 1.1),
    ("warmup_steps", -1),
    ("warmup_ratio", 1.1),
    ("weight_decay", -1),
    ("optimizer", "lion"),
    ("checkpoint_steps", 0),
    ("keep_checkpoints", 0),
    ("evaluation_steps", 0),
    ("keep_best", "loss"),
    ("keep_best", 3),
    ("early_stopping_patience", 0),
    ("early_stopping_threshold", -0.1),
    ("stop_after_nonfinite", 0),
    ("logging_steps", 0),
    ("seed", -1),
    ("seed", 2**32),
    ("dtype", "int8"),
    ("tuning", "prompt"),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_hyperparameter_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Hyperparameters.model_validate({name: value})
    assert caught.value.errors()[0]["loc"][0] == name


def test_value_outside_of_a_typical_range_is_accepted() -> None:
    given = Hyperparameters(lora_rank=3, batch_size=1000, learning_rate=0.9, epochs=0.1, checkpoint_steps=1)
    assert (given.lora_rank, given.batch_size, given.learning_rate) == (3, 1000, 0.9)


@pytest.mark.parametrize("name", ["a", "客服-微调_1.0", "Run.2", "x" * 60, "训" * 33])
def test_name_may_have_letters_of_any_script(name: str) -> None:
    assert train(name=name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", "a\\b", ".hidden", "-rf", "a..b", "a.", "a b", "a\n", "x" * 61, "_a", "a\x00b"],
)
def test_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        train(name=name)


@pytest.mark.parametrize("name", ["训" * 34, "x" * 39 + "训" * 21])
def test_name_too_long_for_the_folders_named_after_it_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="too long for the folders"):
        train(name=name)


def test_lora_targets_are_one_text_or_a_list() -> None:
    assert Hyperparameters.model_validate({"lora_targets": "q_proj, v_proj"}).lora_targets == [
        "q_proj",
        "v_proj",
    ]
    assert Hyperparameters(lora_targets=["mlp.up_proj"]).lora_targets == ["mlp.up_proj"]
    assert Hyperparameters().lora_targets == "all-linear"


CONTRADICTORY = [
    ({"hyperparameters": {"tuning": "full", "load_in_4bit": True}}, "4 bits", "tuning: lora"),
    ({"hyperparameters": {"tuning": "full"}, "through": "customized"}, "self-contained", "through: complete"),
    ({"validation_dataset": "v", "validation_split": 0.1}, "not from both", "one of the two"),
    ({"hyperparameters": {"max_input_length": 2000}}, "max_input_length (2000)", "at least 2000"),
    ({"hyperparameters": {"max_content_length": 2000}}, "max_content_length (2000)", "at least 2000"),
    ({"hyperparameters": {"keep_best": "eval_loss"}}, "no validation rows", "leave keep_best out"),
    ({"hyperparameters": {"early_stopping_patience": 2}}, "no validation rows", "leave early_stopping_patience out"),
    ({"endpoint": "e"}, "endpoint", "through: deployed"),
    ({"prompt_column": "text", "completion_column": "text"}, "same column", "different"),
]


@pytest.mark.parametrize(("values", "why", "mend"), CONTRADICTORY)
def test_contradiction_is_refused_with_reason_and_mend(values: dict[str, Any], why: str, mend: str) -> None:
    with pytest.raises(ValidationError) as caught:
        train(**values)
    (found,) = caught.value.errors()[0]["ctx"]["found"]
    assert why in found["problem"]
    assert mend in found["mend"]


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        train(validation_dataset="v", validation_split=0.1, endpoint="e")
    assert len(caught.value.errors()[0]["ctx"]["found"]) == 2


@pytest.mark.parametrize(
    ("tuning", "through", "expected"),
    [
        ("lora", None, ["customized"]),
        ("lora", "complete", ["customized", "complete"]),
        ("lora", "deployed", ["customized", "complete", "deployed"]),
        ("full", None, ["complete"]),
        ("full", "deployed", ["complete", "deployed"]),
    ],
)
def test_lifecycle_path_follows_tuning_and_through(tuning: str, through: str | None, expected: list[str]) -> None:
    config = train(through=through, hyperparameters={"tuning": tuning})
    assert path_of(config) == expected
    assert effective_through(config) == expected[-1]


def test_every_field_has_title_description_and_limits() -> None:
    for model in (TrainConfig, Hyperparameters):
        for name, schema in fields_of(model).items():
            assert schema.get("title"), name
            assert str(schema.get("description", "")).endswith("."), name
            assert limits_of(schema), name


def test_documented_ranges_are_kept_with_their_source() -> None:
    fields = fields_of(Hyperparameters)
    outside = {
        "lora_rank": 5,
        "max_seq_length": 1000,
        "max_input_length": 255,
        "max_content_length": 2049,
        "num_generations": 11,
        "max_grad_norm": 0.4,
        "epochs": 51,
        "max_steps": 99,
        "batch_size": 65,
        "grad_accum_steps": 17,
        "learning_rate": 0.1,
        "warmup_steps": 5001,
        "warmup_ratio": 0.3,
        "checkpoint_steps": 1005,
    }
    inside = {
        "lora_rank": 64,
        "max_seq_length": 512,
        "max_input_length": 256,
        "max_content_length": 2048,
        "num_generations": 10,
        "max_grad_norm": 0.5,
        "epochs": 50,
        "max_steps": 100,
        "batch_size": 64,
        "grad_accum_steps": 16,
        "learning_rate": 2e-5,
        "warmup_steps": 0,
        "warmup_ratio": 0.01,
        "checkpoint_steps": 1010,
    }
    for name in outside:
        typical = typical_of(fields[name])
        assert typical is not None
        assert typical["source"]
        assert not is_typical(outside[name], typical), name
        assert is_typical(inside[name], typical), name


def test_reference_table_lists_every_field_with_default_limits_and_spellings() -> None:
    table = parameter_table()
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert set(rows) == {*TrainConfig.model_fields, *Hyperparameters.model_fields}
    assert all(line.count(" | ") == 5 for line in rows.values())
    for name, spellings in SPELLINGS.items():
        assert name == "preset" or all(f"`{spelling}`" in rows[name] for spelling in spellings)
    assert "| `0.0001` | a number > 0 and ≤ 1 | 1e-06 to 0.001 (" in rows["learning_rate"]
    assert "| not set | a whole number ≥ 1, or not set | 100 to 50000 (" in rows["max_steps"]
    assert "required" in rows["dataset"]


def test_no_spelling_means_two_parameters() -> None:
    owners: dict[str, str] = {}
    for name in (*TrainConfig.model_fields, *Hyperparameters.model_fields, "preset"):
        for spelling in (name, *SPELLINGS.get(name, ())):
            assert owners.setdefault(spelling_key(spelling), name) == name
    assert set(SPELLINGS) <= set(owners.values())

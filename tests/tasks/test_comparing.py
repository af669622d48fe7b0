"""Trains side by side: what differs, and what came out."""

from __future__ import annotations

from typing import Any

from configs.records import TrainRecord
from configs.train import TrainConfig
from tasks.comparing import compare_trains


def record(train_id: str, config: dict[str, Any] | None = None, **fields: Any) -> TrainRecord:
    given = {"name": train_id, "base_model": "base", "dataset": "rows", **(config or {})}
    return TrainRecord(id=train_id, config=TrainConfig.model_validate(given), run_id="0" * 32, **fields)


def test_only_parameters_that_differ_are_listed() -> None:
    comparison = compare_trains(
        [
            record("one", {"hyperparameters": {"learning_rate": 1e-4, "batch_size": 4}}),
            record("two", {"hyperparameters": {"learning_rate": 5e-4, "batch_size": 4}, "description": "other"}),
        ]
    )
    assert comparison.trains == ["one", "two"]
    assert comparison.parameters == {"learning_rate": [1e-4, 5e-4]}


def test_derived_values_are_compared_as_they_count() -> None:
    comparison = compare_trains(
        [
            record("one", {"hyperparameters": {"lora_rank": 8}}),
            record("two", {"hyperparameters": {"lora_rank": 8, "lora_alpha": 16}}),
            record("three", {"hyperparameters": {"lora_rank": 4}, "through": "customized"}),
        ]
    )
    assert comparison.parameters == {"lora_alpha": [16, 16, 8], "lora_rank": [8, 8, 4]}


def test_datasets_are_compared_by_version() -> None:
    one, two = record("one", dataset="rows@aaaa"), record("two", dataset="rows@bbbb")
    assert compare_trains([one, two]).parameters == {"dataset": ["rows@aaaa", "rows@bbbb"]}
    assert compare_trains([one, one]).parameters == {}


def test_method_parameters_that_only_one_train_has_are_compared() -> None:
    comparison = compare_trains([record("one", {"method_params": {"beta": 0.1}}), record("two")])
    assert comparison.parameters == {"method_params.beta": [0.1, None]}


def test_figures_of_all_trains_are_listed_with_gaps_for_missing_ones() -> None:
    comparison = compare_trains(
        [
            record("one", outcome={"steps": 6, "loss": 0.5}, evaluation={"tuned": {"accuracy": 90.0}}),
            record("two", outcome={"steps": 6}),
        ]
    )
    assert comparison.figures == {"steps": [6, 6], "loss": [0.5, None], "tuned accuracy": [90.0, None]}

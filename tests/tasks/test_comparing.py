"""Trains side by side: what differs, and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.records import TrainRecord
from configs.train import TrainConfig
from methods import contract
from tasks.comparing import compare_trains, draw_trains
from tasks.comparing_report import as_page
from tasks.evaluation import Evaluation
from tasks.trains import train_folder
from tests.evaluations import evaluation_of


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


# --- which is better ----------------------------------------------------------------------------------------


def answers(right: int, of: int = 40, dataset: str = "test@0123456789ab") -> Evaluation:
    rows = [(f"light {number}", f"on {number}", f"on {number}" if number < right else "?") for number in range(of)]
    return evaluation_of(rows, dataset=dataset)


def test_the_verdict_names_the_better_train_with_the_interval() -> None:
    records = [record("one"), record("two"), record("three")]
    found = compare_trains(records, "f1", {"one": answers(20), "two": answers(35), "three": answers(21)})
    assert found.better == "two"
    two, three = found.verdict.splitlines()
    assert found.verdicts == {"two": two, "three": three}
    assert two.startswith(
        "two is better than one by F1: 87.50 % against 50.00 % on 40 rows, +37.50 points, 95 % interval ["
    )
    assert "McNemar p 6.1e-05" in two
    assert three.startswith("three and one are not told apart by F1")
    by_metric = {each.metric: each for each in found.differences["two"]}
    assert (by_metric["accuracy"].first, by_metric["accuracy"].second) == (50, 87.5)
    worse = compare_trains([record("one"), record("two")], "f1", {"one": answers(35), "two": answers(20)})
    assert (worse.better, worse.verdict.split(" by ")[0]) == (None, "two is worse than one")


def test_rows_that_differ_most_come_first_among_the_samples() -> None:
    found = compare_trains([record("one"), record("two")], "f1", {"one": answers(1), "two": answers(3)})
    assert [sample.row for sample in found.samples[:3]] == [2, 3, 1]
    assert (found.samples[0].answers, found.samples[0].figures) == (["?", "on 1"], [0, 100])
    assert len(found.samples) == 10


def test_trains_without_common_rows_are_compared_by_their_losses_without_an_interval() -> None:
    records = [record("one"), record("two")]
    validated = {"one": {"eval_loss": 0.5}, "two": {"eval_loss": 0.25}}
    found = compare_trains(records, validated=validated)
    assert found.better is None
    assert "eval_loss (less is better; one figure a train, so without an interval): one 0.5, two 0.25" in found.verdict
    measured = [
        record(name, evaluation_dataset="test@0123456789ab", evaluation={"tuned": {"perplexity": value}})
        for name, value in (("one", 9.5), ("two", 7.25))
    ]
    assert "tuned perplexity (less is better; one figure a train, so" in compare_trains(measured).verdict
    elsewhere = [measured[0], measured[1].model_copy(update={"evaluation_dataset": "other@0123456789ab"})]
    assert "perplexity" not in compare_trains(elsewhere).verdict
    other = compare_trains(records, "f1", {"one": answers(1), "two": answers(3, dataset="other@0123456789ab")})
    assert "scored on other rows (other@0123456789ab)" in other.not_compared["two"]
    assert other.samples == []


def test_versions_of_data_code_and_packages_are_told_where_they_differ() -> None:
    one, two = (
        record("one", dataset="rows@aaaa", code_version="v1"),
        record("two", dataset="rows@bbbb", code_version="v2"),
    )
    packages = {"one": {"torch": "2.12", "trl": "1.16"}, "two": {"torch": "2.13", "trl": "1.16", "extra": "1"}}
    assert compare_trains([one, two], packages=packages).versions == {
        "dataset": ["rows@aaaa", "rows@bbbb"],
        "code": ["v1", "v2"],
        "package extra": [None, "1"],
        "package torch": ["2.12", "2.13"],
    }


def test_the_page_has_the_curves_and_text_that_stays_text(home: Path) -> None:
    records = [record("one", {"hyperparameters": {"learning_rate": 1e-4}}), record("two")]
    for each, slope in zip(records, (1.0, 2.0), strict=True):
        events = train_folder(each.id) / "training" / contract.EVENTS_FILE
        events.parent.mkdir(parents=True)
        lines = [
            json.dumps({"type": "metrics", "time": 1.0, "step": step, "values": {"loss": slope / step}}) + "\n"
            for step in (1, 2, 3)
        ]
        events.write_text("".join(lines))
    hostile = evaluation_of([("<script>alert(1)</script>", "on", "on"), ("b", "on", "on")])
    found = compare_trains(records, "f1", {"one": hostile, "two": hostile})
    page = as_page(found, records, "http://127.0.0.1:5000/#/compare-runs?runs=1")
    assert "<script>" not in page
    assert "data:image/png;base64," in page
    for heading in ("Parameters that differ", "Outcome", "Curves", "Samples", "two against one"):
        assert f">{heading}</h2>" in page
    assert "parameters that are the same</summary>" in page
    assert "compare-runs?runs=1" in page
    assert draw_trains(records, home / "picture.png")
    assert not draw_trains([record("three")], home / "none.png")

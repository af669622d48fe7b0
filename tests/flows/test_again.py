"""A train again: its copy takes the same first step, its reproduction is the same, and a change is told from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.records import ModelRecord, TrainRecord
from configs.resolve import COPIED_FROM, ResolvedTrain, resolve_train
from methods import contract
from tasks import trains
from tasks.comparing import compare_kept
from tasks.plots import curves_of
from tasks.reproducing import REPORT_FILE, Reproduction, compare_reproduction, pinned_config
from tasks.stages import EventTail
from tasks.tracking import mlflow_client, train_yaml
from tests.flows.command_line import printed, tuneline
from tests.flows.tiny_trains import installation, resolved

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.lifecycle]


@dataclass
class Place:
    root: Path
    original: TrainRecord


def run(given: ResolvedTrain) -> TrainRecord:
    from flows.customized import customized

    model: ModelRecord = customized(train=given.config, origins=given.origins)
    return trains.load_train(str(model.train))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("again")
    with installation(root):
        given = resolved(
            root,
            "lights",
            validation_dataset=str(root / "validation.jsonl"),
            evaluation_dataset=str(root / "test.jsonl"),
        )
        yield Place(root, run(given))


def losses(record: TrainRecord) -> list[tuple[int, float]]:
    events = EventTail(trains.train_folder(record.id) / "training" / contract.EVENTS_FILE).read()
    return curves_of(events)["loss"]


def test_a_copy_takes_the_very_same_first_step_although_the_file_has_changed(place: Place) -> None:
    """And with another learning rate it goes on otherwise, which a comparison tells."""
    file = place.root / "copy.yaml"
    changes = ["name=copy", "learning_rate=0.002"]
    copy = resolve_train(None, changes, copied=pinned_config(place.original), copied_from=place.original.id)
    file.write_text(f"{COPIED_FROM}: {place.original.id}\n{train_yaml(copy.config)}", encoding="utf-8")
    rows = place.root / "rows.jsonl"
    before = rows.read_text(encoding="utf-8")
    rows.write_text(json.dumps({"prompt": "other", "completion": "row"}) + "\n" + before, encoding="utf-8")
    try:
        again = run(resolve_train(file))
    finally:
        rows.write_text(before, encoding="utf-8")
    assert losses(again)[0] == losses(place.original)[0]
    assert losses(again)[-1] != losses(place.original)[-1]
    assert again.dataset == place.original.dataset
    tags = mlflow_client().get_run(again.run_id).data.tags
    assert tags["tuneline.copied_from"] == place.original.id

    other = compare_reproduction(place.original, again)
    assert (other.agreement, other.curves["loss"].step) == ("different", 3)  # the first step warms up from zero
    compared = compare_kept([place.original, again])
    assert compared.parameters == {"learning_rate": [0.01, 0.002]}
    assert "by F1" in compared.verdict
    assert {"eval_loss", "tuned f1"} <= set(compared.figures)


def test_a_reproduction_is_the_same(place: Place) -> None:
    home = place.root / "home"
    told = printed(tuneline("trains", "reproduce", place.original.id, home=home, cwd=place.root, seconds=300))
    again = told.splitlines()[-1].removeprefix("same: ").split()[0]
    assert told.endswith(f"\nsame: {again} has the very numbers of {place.original.id}\n")
    assert "3 of 3 answers are the same" in told
    kept = (trains.train_folder(again) / REPORT_FILE).read_bytes()
    found = Reproduction.model_validate_json(kept)
    assert (found.agreement, found.answers_same) == ("same", 3)
    assert {"loss", "eval_loss", "grad_norm", "learning_rate"} <= set(found.curves)
    assert {"tuned f1", "base f1", "loss"} <= set(found.figures)
    assert again != place.original.id

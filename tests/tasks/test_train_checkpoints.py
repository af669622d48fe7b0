"""Trains by their YAML that keep their best checkpoint, stop early, stop at NaN, and models of earlier checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.resolve import ResolvedTrain, resolve_train
from configs.settings import Settings
from methods.toolkit import merging
from tasks import models, tracking, train_checkpoints, trains
from tests.flows.tiny_trains import installation, resolved, train_file

pytestmark = pytest.mark.lifecycle  # whole trains and a real server, a minute and more

HYPER: dict[str, Any] = {
    "max_steps": 20,
    "evaluation_steps": 2,
    "num_generations": 1,
    "checkpoint_steps": 20,
    "keep_checkpoints": 2,
    "lr_scheduler": "constant",
    "keep_best": "eval_loss",
    "early_stopping_patience": 3,
}


@dataclass
class Place:
    """The installation the tests of this file share, and the train that has overfitted."""

    root: Path
    settings: Settings
    model: ModelRecord

    @property
    def record(self) -> TrainRecord:
        return trains.load_train(str(self.model.train))

    def checkpoint(self, step: int) -> Path:
        return trains.train_folder(self.record.id) / "training" / "checkpoints" / f"checkpoint-{step}"


def contrary(root: Path) -> Path:
    """Validation rows that answer the prompts differently: their loss rises once the answers are learned."""
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()[:12]]
    path = root / "contrary.jsonl"
    text = "".join(json.dumps({**row, "completion": "the light is dark"}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def ignore(_: object) -> None:
    """The events of a stage, which nobody looks at here."""


def run(given: ResolvedTrain) -> ModelRecord:
    """Train, and save what it leaves, as the flows do it with their tasks."""
    record = trains.open_train(given.config, given.origins, [])
    try:
        record = trains.prepare_datasets(trains.fetch_base(record))
        record = trains.train_model(record, ignore)
        trained = trains.trained_model(record)
        model = trains.register_customized(record) if trained.adapter else trains.save_complete(trained, ignore)
    except Exception as error:
        trains.close_train(record, "failed", str(error))
        raise
    trains.close_train(record, "completed")
    return model


def save(reference: str, checkpoint: str) -> ModelRecord:
    """`tuneline save TRAIN --checkpoint`, without a flow."""
    record = train_checkpoints.train_of(reference)
    step = train_checkpoints.chosen_step(record, checkpoint)
    return trains.save_complete(train_checkpoints.save_checkpoint(record, step, ignore), ignore)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("checkpoints")
    with installation(root) as settings:
        given = resolved(root, "overfitted", hyper=HYPER, validation_dataset=str(contrary(root)))
        yield Place(root, settings, run(given))


def test_the_best_checkpoint_is_registered_and_recorded(place: Place) -> None:
    record, model = place.record, place.model
    points = tracking.mlflow_client().get_metric_history(record.run_id, "eval_loss")
    lowest = min(points, key=lambda point: (point.value, point.step))
    assert record.status == "completed"
    assert record.outcome["best_step"] == model.step == lowest.step
    assert record.outcome["best_eval_loss"] == lowest.value < record.outcome["last_eval_loss"]
    assert record.outcome["steps"] == lowest.step + 6 < 20
    assert str(record.stopped).startswith(f"stopped early at step {lowest.step + 6}: eval_loss has not improved in 3")
    run = tracking.mlflow_client().get_run(record.run_id).data
    assert (run.metrics["best_step"], run.metrics["best_eval_loss"]) == (lowest.step, lowest.value)
    assert run.tags["tuneline.stopped"] == record.stopped
    version = tracking.mlflow_client().get_model_version(model.line, str(model.registered_version))
    assert version.tags["tuneline.step"] == str(lowest.step)
    kept = (place.checkpoint(lowest.step) / "adapter_model.safetensors").read_bytes()
    assert (model.path / "adapter_model.safetensors").read_bytes() == kept


def test_checkpoints_are_listed_with_step_metric_and_size(place: Place) -> None:
    kept = train_checkpoints.train_checkpoints(place.record)
    best, last = int(place.record.outcome["best_step"]), int(place.record.outcome["steps"])
    assert [each.step for each in kept] == [best, last - 2, last]
    assert [each.best for each in kept] == [True, False, False]
    assert all(each.size > 10_000 and "eval_loss" in each.figures for each in kept)
    chosen = [train_checkpoints.chosen_step(place.record, name) for name in ("best", "last", str(last - 2))]
    assert chosen == [best, last, last - 2]
    with pytest.raises(UserError, match=rf"one of {best}, {last - 2}, {last}, last, best"):
        train_checkpoints.chosen_step(place.record, "1")


def test_an_earlier_checkpoint_becomes_a_complete_model(place: Place) -> None:
    last = int(place.record.outcome["steps"])
    made = save(place.record.id, "last")
    adapter = models.find_model(str(made.parent))
    assert adapter.name == f"{place.model.name}_step{last}"
    assert (adapter.stage, adapter.adapter, adapter.step, adapter.train) == ("customized", True, last, place.record.id)
    kept = (place.checkpoint(last) / "adapter_model.safetensors").read_bytes()
    assert (adapter.path / "adapter_model.safetensors").read_bytes() == kept
    assert (made.stage, made.step, made.line) == ("complete", last, place.model.line)
    assert made.registered_version is not None
    expected = merging.merged(str(made.base_path), str(place.checkpoint(last))).state_dict()
    saved = load_file(made.path / "model.safetensors")
    assert saved
    assert all(torch.equal(saved[name], expected[name].to(saved[name].dtype)) for name in saved)
    version = tracking.mlflow_client().get_model_version(made.line, made.registered_version)
    assert (version.tags["tuneline.step"], version.tags["tuneline.parent"]) == (str(last), adapter.name)
    # The train's own name means what it has left, as before.
    assert models.find_model(place.record.id).name == place.model.name
    assert place.record.model == place.model.name
    assert save(place.record.id, str(last)) == made  # once


def test_full_weights_of_an_earlier_checkpoint(place: Place) -> None:
    hyper = {"tuning": "full", "max_steps": 4, "checkpoint_steps": 2, "learning_rate": 0.001}
    given = resolved(place.root, "full-steps", hyper=hyper)
    end = run(given)
    made = save("full-steps", "2")
    folder = trains.train_folder(str(end.train)) / "training" / "checkpoints"
    for model, step in ((made, 2), (end, 4)):
        kept = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(model.path / "model.safetensors")
        assert model.step == step
        assert all(torch.equal(saved[name], kept[name].to(saved[name].dtype)) for name in saved)
    assert made.parent is not None
    assert made.parent.endswith("_step2")


def test_a_train_that_stops_at_nan_says_which_checkpoints_are_good_and_one_can_be_saved(place: Place) -> None:
    hyper = {"learning_rate": 1.0, "weight_decay": 1e30, "warmup_steps": 3, "lr_scheduler": "constant_with_warmup"}
    given = resolved(place.root, "diverged", hyper={**hyper, "checkpoint_steps": 1, "keep_checkpoints": 1})
    with pytest.raises(UserError, match=r"became (nan|inf) at step \d"):
        run(given)
    record = trains.load_train("diverged")
    assert record.status == "failed"
    kept = train_checkpoints.train_checkpoints(record)
    assert f"steps {', '.join(str(each.step) for each in kept)} are kept" in str(record.reason)
    good = trains.train_folder(record.id) / "training" / "checkpoints" / f"checkpoint-{kept[0].step}"
    tensors = load_file(good / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    with pytest.raises(UserError, match="training has changed nothing"):  # its first step has rate 0
        save(record.id, str(kept[0].step))
    assert models.find_model(f"{record.base}_{record.id}_step{kept[0].step}").step == kept[0].step


def test_what_cannot_be_is_refused_before_anything_is_begun(place: Place) -> None:
    without = train_file(place.root, "without", hyper={"keep_best": "eval_loss"})
    with pytest.raises(UserError, match=r"keep_best compares evaluations while training, and there are no validation"):
        resolve_train(without)
    rows = str(place.root / "contrary.jsonl")
    unknown = train_file(place.root, "unknown", hyper={"keep_best": "eval_rouge"}, validation_dataset=rows)
    with pytest.raises(UserError, match="one of not set, eval_loss, eval_token_accuracy"):
        resolve_train(unknown)
    ppo = train_file(place.root, "ppo", hyper={"keep_best": "eval_reward"}, validation_dataset=rows, method="ppo")
    with pytest.raises(UserError, match="the method ppo has no use for this parameter"):
        resolve_train(ppo)

"""The checkpoints of a train, and the model that is made of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.settings import load_settings
from methods import contract
from methods.registry import find_method
from methods.toolkit.best_metric import is_lower_better, standing
from tasks import models, trains
from tasks.files import read_record
from tasks.gpus import borrowing_slot
from tasks.stages import EventTail, run_stage

_PARTED = ("fsdp", "deepspeed")
_DEFAULT_METRICS = ("eval_loss", "eval_reward")


class TrainCheckpoint(BaseModel):
    """One whole checkpoint: its step, its size in bytes, the figures of the evaluation at its step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    size: int
    figures: dict[str, float]
    best: bool = False


def train_checkpoints(record: TrainRecord) -> list[TrainCheckpoint]:
    """The whole checkpoints of a train, oldest first; one is the best if the train has evaluated itself."""
    folder = trains.train_folder(record.id) / "training"
    figures = _evaluations(folder)
    kept = {_step(path): path for path in contract.complete_checkpoints(folder / "checkpoints")}
    best = _best_step(record, {step: figures[step] for step in kept if step in figures})
    return [
        TrainCheckpoint(step=step, size=_size(path), figures=figures.get(step, {}), best=step == best)
        for step, path in kept.items()
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _size(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running train removes old checkpoints
            found += path.stat().st_size
    return found


def _evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """The newest figures of the evaluations by step, those that one can be the best by."""
    found: dict[int, dict[str, float]] = {}
    for event in EventTail(folder / contract.EVENTS_FILE).read():
        if event["type"] == "metrics":
            figures = {name: value for name, value in event["values"].items() if is_lower_better(name) is not None}
            if figures:
                found.setdefault(event["step"], {}).update(figures)
    return found


def _best_step(record: TrainRecord, evaluations: Mapping[int, Mapping[str, float]]) -> int | None:
    """The best of the checkpoints by keep_best; where it is not set, by the loss or the reward."""
    names = [record.config.hyperparameters.keep_best or "", *_DEFAULT_METRICS]
    found = (standing(evaluations, name) for name in names if name)
    return next((each.best_step for each in found if each is not None), None)


def chosen_step(record: TrainRecord, wanted: str) -> int:
    """The step of a checkpoint by its number, `best` or `last`. Raises UserError with those there are."""
    kept = train_checkpoints(record)
    best = next((each.step for each in kept if each.best), None)
    named = {str(each.step): each.step for each in kept}
    named |= {"last": kept[-1].step} if kept else {}
    named |= {"best": best} if best is not None else {}
    if wanted not in named:
        raise UserError(
            "the train has no such checkpoint",
            field="checkpoint",
            value=wanted,
            expected=f"one of {', '.join(named)}" if named else "none: this train has no whole checkpoint",
            mend=f"`tuneline trains show {record.id}` lists them",
        )
    return named[wanted]


def train_of(reference: str) -> TrainRecord:
    """The train of its id or name, or that of a model. Raises UserError if there is none."""
    try:
        return trains.load_train(reference)
    except UserError:
        model = next((each for each in models.list_models() if each.name == reference), None)
        if model is None or model.train is None:
            raise
        return trains.load_train(model.train)


def save_checkpoint(record: TrainRecord, step: int, on_events: trains.EventHandler) -> ModelRecord:
    """Make what the train would have left at that step: a registered adapter, or full weights that are to be saved.

    The method's own training stage does it, from the checkpoint and without a further step. A model that is there
    already is kept. Raises UserError, StageFailed, StageCancelled.
    """
    _check_method(record)
    settings = load_settings()
    model = trains.trained_model(record)
    name = f"{model.name}_step{step}"
    folder = settings.root / "saves" / name / "checkpoint"
    place = {"name": name, "step": step, "from_checkpoint": True, "path": folder / "output"}
    model = model.model_copy(update=place)
    registered = settings.models / name / models.RECORD_FILE
    if registered.exists():
        return models.register_model(read_record(registered, ModelRecord))
    if trains.saved_complete(model) is not None:
        return model.model_copy(update={"adapter": False})
    result = _run(record, step, folder, on_events)
    model = model.model_copy(update={"adapter": bool(result["adapter"])})
    if not model.adapter:
        return model
    stored = model.model_copy(update={"stage": "customized", "path": settings.models / name})
    return models.publish_model(stored, folder / "output")


def _check_method(record: TrainRecord) -> None:
    method, spread = find_method(record.config.method), record.config.distribution
    reason = None
    if "keep_best" in method.hyperparameters.unused:
        reason = f"the training of the method {method.name} makes no model of a checkpoint"
    elif spread in _PARTED:
        reason = f"with distribution {spread} each process holds a part of a checkpoint"
    if reason is not None:
        raise UserError(
            reason, field="checkpoint", value=record.id, mend="set keep_best to have the train save its best checkpoint"
        )


def _run(record: TrainRecord, step: int, folder: Path, on_events: trains.EventHandler) -> dict[str, Any]:
    """Run the training stage from the checkpoint to its product; the train cannot go on meanwhile."""
    method = find_method(record.config.method)
    trains.own_train(record.id)
    try:
        job = trains.checkpoint_job(record, step, folder)
        python, file = method.stage_python("training"), method.stage_file("training")
        with borrowing_slot(f"save {record.id}", on_events):
            result = run_stage(folder, job, python, file, load_settings().grace_seconds, on_events)
    finally:
        trains.let_go(record.id)
    if int(result.get("steps", -1)) != step:
        raise UserError(
            f"the method {method.name} has trained on instead of saving the checkpoint",
            field="checkpoint",
            value=step,
            mend="its training stage is to call methods.toolkit.training.run_training",
        )
    return result

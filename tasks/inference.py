"""Answers of a model, made by its method's inference stage."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field

from configs.records import ModelRecord
from configs.settings import load_settings
from methods.registry import StageName, find_method
from tasks.gpus import borrowing_slot
from tasks.stages import StageJob, run_stage

Message = dict[str, str]


class Generation(BaseModel):
    """How answers are made; temperature 0 is greedy."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=50, ge=0)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=42, ge=0)


class Answer(BaseModel):
    """One answer and the prompt as the model saw it."""

    answer: str
    tokens: int
    hit_limit: bool
    prompt_token_ids: list[int]


def answer_prompts(
    model: ModelRecord,
    conversations: Sequence[list[Message]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[Answer]:
    """The model's answers to the conversations, in order. Raises UserError, StageFailed, StageCancelled."""
    settings = load_settings()
    settings.root.mkdir(parents=True, exist_ok=True)
    method = find_method(model.method)
    stage: StageName = "inference-customized" if model.adapter else "inference-complete"
    _remove_left_behind(settings.root)
    work = Path(tempfile.mkdtemp(prefix=f"inference-{os.getpid()}-", dir=settings.root))
    try:
        requests = work / "requests.jsonl"
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
        requests.write_text("".join(lines), encoding="utf-8")
        job = StageJob(
            stage=stage,
            parameters={**generation.model_dump(exclude={"seed"}), "dtype": model.dtype},
            inputs={"requests": str(requests), **_weights(model)},
            output=work / "output",
            seed=generation.seed,
        )
        python, file = method.stage_python(stage), method.stage_file(stage)
        with borrowing_slot(work.name, on_events):
            run_stage(work, job, python, file, settings.grace_seconds, on_events)
        predictions = (work / "output" / "predictions.jsonl").read_text(encoding="utf-8")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [Answer.model_validate_json(line) for line in predictions.split("\n")[:-1]]


def _remove_left_behind(root: Path) -> None:
    """Remove the work folders of processes that were killed while their models answered."""
    for folder in root.glob("inference-*-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _weights(model: ModelRecord) -> dict[str, str]:
    if model.adapter:
        return {"base_model": str(model.base_path), "adapter": str(model.path)}
    return {"model": str(model.path)}

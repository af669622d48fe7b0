"""Answers of a model, made by its method's inference stage."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import UserError
from configs.records import ModelRecord
from configs.settings import load_settings
from configs.train import TemplateVariables, ThinkingMode
from methods.registry import StageName, find_method
from methods.toolkit.tool_parsing import Parsed, parse_calls
from tasks.gpus import borrowing_slot
from tasks.remote_code import allowed_digests
from tasks.stages import StageJob, run_stage

Message = dict[str, Any]
_USUAL_BATCH = 16


class Generation(BaseModel):
    """How answers are made; temperature 0 is greedy."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=50, ge=0)
    batch_size: int | Literal["auto"] = Field(default="auto", description="Rows at a time; auto: by the free memory.")
    model_settings: tuple[str, ...] = Field(
        default=(), description="Settings that the model's own generation_config decides, as at a server; else none."
    )
    seed: int = Field(default=42, ge=0)
    thinking: ThinkingMode = Field(default="auto", description="Whether answers have a thought; auto: as the template.")
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    template_date: date | None = Field(default=None, description="Date that templates print; None: today.")

    def parameters(self) -> dict[str, Any]:
        """What an inference stage is given; `batch_size` is a number for stages that do not go by the memory."""
        given = self.model_dump(exclude={"seed", "template_date"})
        return given | {
            "batch_size": _USUAL_BATCH if self.batch_size == "auto" else self.batch_size,
            "batch_size_by_memory": self.batch_size == "auto",
        }


class Speed(BaseModel):
    """How an inference stage answered, and how fast, by its own word."""

    tokens: int
    seconds: float = Field(description="Of the whole stage after its model was loaded.")
    tokens_per_second: float = Field(description="Tokens of the answers in a second of making them.")
    batch_size: int | None = Field(default=None, description="Rows at a time.")
    dtype: str | None = Field(default=None, description="Number type that the model was loaded in.")
    generation: dict[str, Any] = Field(default_factory=dict, description="Settings that answers were made with.")

    def in_words(self) -> str:
        """One line for the terminal."""
        batch = f", {self.batch_size} rows at a time" if self.batch_size is not None else ""
        dtype = f", {self.dtype}" if self.dtype is not None else ""
        return f"{self.tokens} tokens in {self.seconds:.0f} s ({self.tokens_per_second:.1f} tokens/s{batch}{dtype})"


class Answer(BaseModel):
    """One answer and the prompt as the model saw it; how likely the reference is to the model, if that was asked."""

    answer: str = Field(description="Without the thought before it.")
    thought: str | None = Field(default=None, description="What the model has thought before the answer.")
    said: str | None = Field(default=None, description="Thought and answer as a server returns them; None: the answer.")
    tokens: int
    hit_limit: bool
    prompt_token_ids: list[int]
    reference_logprob: float | None = Field(default=None, description="Natural logarithm of the likelihood.")
    reference_tokens: int = Field(default=0, description="Its tokens, the end token included.")
    tool_calls: list[dict[str, Any]] | None = Field(
        default=None, description="Name and arguments of each call; None: not told, the answer is all there is."
    )
    broken_calls: int = Field(default=0, description="Calls that cannot be read.")
    content: str | None = Field(default=None, description="What is said beside the calls.")

    def parsed(self, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """The answer's calls, and what it says beside them."""
        if self.tool_calls is None:
            return parse_calls(self.answer, tools)
        return Parsed(self.answer if self.content is None else self.content, self.tool_calls, self.broken_calls)


def answer_prompts(
    model: ModelRecord,
    conversations: Sequence[list[Message]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> list[Answer]:
    """The model's answers to the conversations, in order; `tools` are those of each.

    Raises UserError, StageFailed, StageCancelled.
    """
    offered = tools or [None] * len(conversations)
    asked = [
        {"messages": messages, **({"tools": each} if each else {})}
        for messages, each in zip(conversations, offered, strict=True)
    ]
    return [Answer.model_validate(each) for each in answer_requests(model, asked, generation, on_events)]


def answer_requests(
    model: ModelRecord,
    requests: Sequence[Mapping[str, Any]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """What the model's inference stage makes of requests of its kind, in order; see `measured_requests`."""
    return measured_requests(model, requests, generation, on_events, keep)[0]


def measured_requests(
    model: ModelRecord,
    requests: Sequence[Mapping[str, Any]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    keep: Path | None = None,
) -> tuple[list[dict[str, Any]], Speed | None]:
    """What the model's inference stage makes of requests, in order, and how it says that it has made them.

    The latter is None for a stage that does not say. Pictures that it makes are moved to the folder `keep`. Raises
    UserError, StageFailed, StageCancelled.
    """
    with _work_folder() as work:
        file = work / "requests.jsonl"
        lines = [json.dumps(request, ensure_ascii=False) + "\n" for request in requests]
        file.write_text("".join(lines), encoding="utf-8")
        result = _run(work, model, {"requests": str(file)}, generation, on_events)
        text = (work / "output" / "predictions.jsonl").read_text(encoding="utf-8")
        predictions: list[dict[str, Any]] = [json.loads(line) for line in text.split("\n")[:-1]]
        if keep is not None:
            for number, each in enumerate(predictions, start=1):
                if "image" in each:
                    each["image"] = str(_moved(Path(each["image"]), keep, number))
    return predictions, _speed(result)


def _speed(result: Mapping[str, Any]) -> Speed | None:
    try:
        return Speed.model_validate(result)
    except ValidationError:  # a stage of the user's own need not report it
        return None


def measure_rows(
    model: ModelRecord,
    rows: Path,
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> dict[str, float]:
    """The figures that the model's inference stage gives for stored rows of its kind, which ask for no text.

    Raises UserError, StageFailed, StageCancelled.
    """
    with _work_folder() as work:
        result = _run(work, model, {"evaluation_rows": str(rows)}, generation, on_events)
    figures = result.get("figures")
    if not isinstance(figures, dict) or not figures:
        raise UserError(
            f"the inference stage of the method {model.method} gives no figures for rows of this kind",
            field="evaluation_dataset",
            value=figures,
            expected="`figures: {name: number}` in its result where its inputs hold evaluation_rows",
        )
    return {str(name): float(value) for name, value in figures.items()}


def inference_stage(model: ModelRecord) -> StageName:
    """The stage of its method that lets the model answer."""
    return "inference-customized" if model.adapter else "inference-complete"


def _run(
    work: Path,
    model: ModelRecord,
    inputs: dict[str, str],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    method, stage = find_method(model.method), inference_stage(model)
    job = StageJob(
        stage=stage,
        parameters={**generation.parameters(), "dtype": model.dtype},
        inputs={
            **inputs,
            **_weights(model),
            "date": _date(generation),
            "remote_code": allowed_digests([model.base_path, model.path]),
        },
        output=work / "output",
        seed=generation.seed,
    )
    python, file = method.stage_python(stage), method.stage_file(stage)
    with borrowing_slot(work.name, on_events):
        return run_stage(work, job, python, file, load_settings().grace_seconds, on_events)


def _date(generation: Generation) -> str | None:
    return generation.template_date.isoformat() if generation.template_date else None


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A folder for one inference, removed afterwards."""
    root = load_settings().root
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    work = Path(tempfile.mkdtemp(prefix=f"inference-{os.getpid()}-", dir=root))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _moved(picture: Path, folder: Path, number: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{number}{picture.suffix}"
    shutil.move(picture, target)
    return target


def _remove_left_behind(root: Path) -> None:
    """Remove the work folders of processes that were killed while their models answered."""
    for folder in root.glob("inference-*-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _weights(model: ModelRecord) -> dict[str, str]:
    if model.adapter:
        return {"base_model": str(model.base_path), "adapter": str(model.path)}
    return {"model": str(model.path)}

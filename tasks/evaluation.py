"""Scores a model on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from configs.datasets import DatasetVersion, Kind
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainStatus
from configs.scoring import RULE_METRICS, RowScores, Scores, ScoringOptions
from methods.registry import find_method
from methods.toolkit.tool_parsing import as_text, calls_of_message
from tasks import models, tracking
from tasks.asking import ask_endpoint
from tasks.files import read_record
from tasks.inference import Answer, Generation, Speed, measured_requests
from tasks.models import logged_model_id
from tasks.scored_files import slice_name
from tasks.scoring import score_rows, summarise
from tasks.stop_words import read_stop_words
from tasks.tool_scores import tool_figures
from tasks.vision_messages import with_images


class Evaluation(BaseModel):
    """The scores of one model on one dataset version, and how often the length limit cut an answer."""

    model: str
    dataset: str
    scores: Scores
    rows: int
    hit_limit: int
    thoughts: int = Field(default=0, description="Answers with a thought before them, which is not scored.")
    perplexity: float | None = Field(default=None, description="Of the references, by token; None: not asked for.")
    speed: Speed | None = Field(default=None, description="How fast it answered; None: it did not tell.")
    predictions: list[dict[str, Any]]
    row_scores: list[RowScores] = Field(
        default_factory=list, description="Of each answer, in the same order; `row` counts the dataset's rows."
    )
    generation: dict[str, Any] = Field(
        default_factory=dict,
        description="How answers were made: `settings`, and in `not_used` those of the model's generation_config "
        "that did not count. Of an endpoint: what it was asked.",
    )
    run_id: str | None = Field(default=None, description="MLflow run, if it was recorded in one of its own.")
    failed: dict[int, str] = Field(
        default_factory=dict, description="Rows (from 1) that got no answer, and why; they are in no score."
    )

    @property
    def figures(self) -> dict[str, float]:
        """The figures one compares, in percent; the perplexity, where there is one, is a number of its own."""
        told = {name: value for name in RULE_METRICS if (value := getattr(self.scores, name)) is not None}
        told["hit_limit"] = 100 * self.hit_limit / self.rows if self.rows else 0.0
        return told | ({} if self.perplexity is None else {"perplexity": self.perplexity})


def evaluate(
    model: ModelRecord,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    options: ScoringOptions | None = None,
    *,
    perplexity: bool = False,
) -> Evaluation:
    """Let the model answer the last turn of each row and score the answers against the row's own.

    `samples` rows from the start of the dataset, -1 for all. With `perplexity` the model is also asked how likely
    the row's own answers are.
    """
    rows = read_rows(version.path, samples)
    requests = [_request(row, version.path.parent) for row in rows]
    if perplexity:
        for row, request in zip(rows, requests, strict=True):
            wanted = row["messages"][-1]
            request["reference"] = wanted if wanted.get("tool_calls") else text_of(wanted)
    predictions, how = measured_requests(model, requests, generation, on_events)
    answers = [Answer.model_validate(each) for each in predictions]
    found = score_answers(model.name, version, rows, answers, options)
    return found.model_copy(update={"speed": how, "generation": how.generation if how is not None else {}})


def _request(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What an inference stage is asked for a stored row: all but its last message, and the images shown so far."""
    asked = row["messages"][:-1]
    if "images" not in row:
        return {"messages": asked, **({"tools": row["tools"]} if row.get("tools") else {})}
    shown = sum(
        part["type"] == "image"
        for message in asked
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    return {"messages": asked, "images": [str(folder / image) for image in row["images"][:shown]]}


def endpoint_kinds(endpoint: Endpoint) -> tuple[Kind, ...]:
    """The kinds of rows that an endpoint can be asked: conversations, with images where its model reads them."""
    deployed = endpoint.current_deployment
    if deployed is None:
        return ("chat",)
    kinds = find_method(models.find_model(deployed.model_name).method).evaluated_kinds
    return ("vision",) if "vision" in kinds else tuple(kind for kind in ("chat", "chat_tools") if kind in kinds)


def asked_of_endpoint(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What an endpoint is asked for a stored row: all but its last message, with the images shown so far in them.

    Its tools go with them.
    """
    messages = with_images(row, folder)["messages"][:-1] if "images" in row else row["messages"][:-1]
    return {"messages": messages, **({"tools": row["tools"]} if row.get("tools") else {})}


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, without its images."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def answer_text(message: Mapping[str, Any]) -> str:
    """What a message says, with a line of JSON for each tool that it calls."""
    return as_text(text_of(message), calls_of_message(message))


def answered_text(row: Mapping[str, Any], answer: Answer) -> str:
    """What a model has answered to a stored row, written as `answer_text` writes the reference."""
    if not _has_tools(row):
        return answer.answer
    parsed = answer.parsed(row.get("tools") or ())
    return as_text(parsed.content, parsed.calls) if parsed.calls else answer.answer


def _has_tools(row: Mapping[str, Any]) -> bool:
    return bool(row.get("tools") or row["messages"][-1].get("tool_calls"))


def _tool_figures(row: Mapping[str, Any], answer: Answer) -> dict[str, float | bool | None]:
    if not _has_tools(row):
        return {}
    tools = row.get("tools") or ()
    return tool_figures(answer.parsed(tools), calls_of_message(row["messages"][-1]), tools)


def score_answers(
    model: str,
    version: DatasetVersion,
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer | UserError],
    options: ScoringOptions | None = None,
) -> Evaluation:
    """Score the answers to the last turns of stored rows, overall and by the columns that the options name.

    Rows without an answer are counted and left out. Raises the first one's error if there is no answer at all.
    """
    options = options or ScoringOptions()
    stop_words = read_stop_words(options.stop_words)
    numbered = list(enumerate(zip(rows, answers, strict=True), start=1))
    answered = [(number, row, answer) for number, (row, answer) in numbered if isinstance(answer, Answer)]
    failures = {number: answer for number, (_, answer) in numbered if isinstance(answer, UserError)}
    if failures and not answered:
        raise next(iter(failures.values()))
    pairs = [(answered_text(row, answer), answer_text(row["messages"][-1])) for _, row, answer in answered]
    scored = [
        each.model_copy(update={"row": number, **_tool_figures(row, answer)})
        for each, (number, row, answer) in zip(score_rows(pairs, stop_words), answered, strict=True)
    ]
    kept = [row for _, row, _ in answered]
    by = {column: _column(kept, column, version) for column in options.by}
    return Evaluation(
        model=model,
        dataset=version.reference,
        scores=summarise(scored, stop_words, confidence=options.confidence, by=by),
        rows=len(scored),
        hit_limit=sum(answer.hit_limit for _, _, answer in answered),
        thoughts=sum(answer.thought is not None for _, _, answer in answered),
        perplexity=_perplexity([answer for _, _, answer in answered]),
        predictions=[
            _prediction(number, row, answer, figures)
            for (number, row, answer), figures in zip(answered, scored, strict=True)
        ],
        row_scores=scored,
        failed={number: str(error) for number, error in failures.items()},
    )


def _prediction(number: int, row: Mapping[str, Any], answer: Answer, figures: RowScores) -> dict[str, Any]:
    messages = row["messages"]
    return {
        "row": number,
        "prompt": answer_text(messages[-2]) if len(messages) > 1 else "",
        "reference": answer_text(messages[-1]),
        "prediction": answered_text(row, answer),
        **({"thought": answer.thought} if answer.thought else {}),
        "exact": figures.accuracy == 100.0,
        "hit_limit": answer.hit_limit,
        **({"extra": row["extra"]} if row.get("extra") else {}),
    }


def _column(rows: Sequence[Mapping[str, Any]], column: str, version: DatasetVersion) -> list[str]:
    """The values of a further column of the stored rows, one a row."""
    known = sorted({name for row in rows for name in row.get("extra", {})})
    if column not in known:
        raise UserError(
            f"the rows of {version.reference} have no further column of this name",
            field="by",
            value=column,
            expected=f"one of: {', '.join(known) or '(they have none)'}",
        )
    return [slice_name(row.get("extra", {}).get(column)) for row in rows]


def _perplexity(answers: Sequence[Answer]) -> float | None:
    """How many tokens the model wavers between, on average, when it is to give the references (1: none)."""
    likelihoods = [answer.reference_logprob for answer in answers if answer.reference_logprob is not None]
    tokens = sum(answer.reference_tokens for answer in answers)
    if not tokens or len(likelihoods) < len(answers):
        return None
    return math.exp(-math.fsum(likelihoods) / tokens)


def read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """The rows of a stored dataset; at most `limit`, -1 for all."""
    with path.open(encoding="utf-8") as file:
        lines = file if limit == -1 else islice(file, limit)
        return [json.loads(line) for line in lines]


def read_conversations(path: Path, limit: int) -> list[list[dict[str, str]]]:
    """The conversations of a stored dataset; at most `limit`, -1 for all."""
    return [row["messages"] for row in read_rows(path, limit)]


def evaluate_and_record(
    model: ModelRecord,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    options: ScoringOptions | None = None,
    *,
    perplexity: bool = False,
    tags: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score a model in an MLflow run of its own: scores, predictions, the dataset, the model's name."""
    outcome = evaluate(model, version, generation, samples, on_events, options, perplexity=perplexity)
    named = {"tuneline.model": model.name, **(tags or {})}
    asked = generation.model_dump(exclude={"model_settings"})
    parameters = {"model": model.name, **asked, **outcome.generation.get("settings", {})}
    with recording(model.name, version, named, parameters) as run_id:
        keep_evaluation(run_id, outcome, "tuned" if model.stage != "base" else "base", logged_model_id(model))
    return outcome.model_copy(update={"run_id": run_id})


@contextmanager
def recording(
    name: str, version: DatasetVersion, tags: Mapping[str, str], parameters: Mapping[str, Any]
) -> Iterator[str]:
    """An MLflow run of an evaluation on a dataset version; yields its id and closes it, whichever way it ends."""
    run_id = tracking.start_run(
        f"{name} on {version.name}", "evaluation", {"tuneline.dataset": version.reference, **tags}
    )
    status: TrainStatus = "failed"
    try:
        tracking.log_parameters(run_id, {**parameters, "dataset": version.reference})
        tracking.log_dataset(run_id, version, "evaluation")
        yield run_id
        status = "completed"
    finally:
        tracking.end_run(run_id, status)


def evaluate_endpoint(
    endpoint: Endpoint,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    options: ScoringOptions | None = None,
    *,
    tags: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score what is deployed at an endpoint by asking it, as its users do; recorded below the model's own run.

    Rows that it does not answer are counted and left out. Raises UserError if nothing is deployed there or if it
    answers none.
    """
    deployment = endpoint.current_deployment
    if deployment is None:
        raise UserError(f"nothing is deployed at the endpoint '{endpoint.name}'", field="endpoint")
    model = models.find_model(deployment.model_name)
    rows = read_rows(version.path, samples)
    asked = [asked_of_endpoint(row, version.path.parent) for row in rows]
    answers = ask_endpoint(endpoint, asked, generation, on_events)
    asked_for = {"max_new_tokens": generation.max_new_tokens, "temperature": generation.temperature}
    outcome = score_answers(deployment.model, version, rows, answers, options)
    outcome = outcome.model_copy(update={"generation": {"settings": asked_for}})
    named = {
        "tuneline.model": model.name,
        "tuneline.deployed_model": deployment.model,
        "tuneline.endpoint": endpoint.name,
        **({"mlflow.parentRunId": model.run_id} if model.run_id else {}),
        **(tags or {}),
    }
    parameters = {
        "model": deployment.model,
        "target": deployment.target,
        "quantization": deployment.quantization or "none",
        **asked_for,
    }
    with recording(deployment.model, version, named, parameters) as run_id:
        keep_evaluation(run_id, outcome, "deployed")
    return outcome.model_copy(update={"run_id": run_id})


def keep_evaluation(run_id: str, outcome: Evaluation, which: str, model_id: str | None = None) -> None:
    """Record scores as metrics (of the logged model too), and every prompt, reference and answer as a table.

    How answers were made is in the file of the scores and in a tag.
    """
    figures = {f"{name}_{which}": value for name, value in outcome.figures.items()}
    tracking.log_scores(run_id, figures, model_id)
    if outcome.speed is not None:
        tracking.log_scores(run_id, {f"tokens_per_second_{which}": outcome.speed.tokens_per_second})
    client = tracking.mlflow_client()
    if outcome.generation:
        client.set_tag(run_id, f"tuneline.generation_{which}", json.dumps(outcome.generation, sort_keys=True)[:5000])
    scores = outcome.model_dump(mode="json", exclude={"predictions", "row_scores"})
    client.log_dict(run_id, scores, f"evaluation/scores_{which}.json")
    rows = outcome.predictions
    table = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    if table:
        client.log_table(run_id, table, f"evaluation/predictions_{which}.json")


def kept_evaluation(folder: Path, which: str) -> Path:
    """Where the answers of `base` or `tuned` are kept, scored row by row, in the folder of the train."""
    return folder / f"evaluation_{which}.json"


def read_evaluation(folder: Path, which: str) -> Evaluation | None:
    """The kept answers of `base` or `tuned`; None if that was not scored."""
    file = kept_evaluation(folder, which)
    return read_record(file, Evaluation) if file.exists() else None

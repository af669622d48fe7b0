"""Scores a model on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.datasets import DatasetVersion
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainStatus
from configs.scoring import Scores
from tasks import models, tracking
from tasks.asking import ask_endpoint
from tasks.inference import Answer, Generation, Message, answer_prompts
from tasks.models import logged_model_id
from tasks.scoring import score_rows, summarise


class Evaluation(BaseModel):
    """The scores of one model on one dataset version, and how often the length limit cut an answer."""

    model: str
    dataset: str
    scores: Scores
    rows: int
    hit_limit: int
    predictions: list[dict[str, Any]]

    @property
    def figures(self) -> dict[str, float]:
        """The figures one compares, in percent."""
        names = ("accuracy", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu_4")
        content = self.scores.model_dump()
        return {
            **{name: content[name] for name in names},
            "hit_limit": 100 * self.hit_limit / self.rows if self.rows else 0.0,
        }


def evaluate(
    model: ModelRecord,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Evaluation:
    """Let the model answer the last turn of each row and score the answers against the row's own.

    `samples` rows from the start of the dataset, -1 for all.
    """
    conversations = read_conversations(version.path, samples)
    answers = answer_prompts(model, [messages[:-1] for messages in conversations], generation, on_events)
    return _scored(model.name, version, conversations, answers)


def _scored(
    model: str, version: DatasetVersion, conversations: Sequence[list[Message]], answers: Sequence[Answer]
) -> Evaluation:
    references = [messages[-1]["content"] for messages in conversations]
    rows = list(score_rows(zip((answer.answer for answer in answers), references, strict=True)))
    predictions = [
        {
            "prompt": messages[-2]["content"] if len(messages) > 1 else "",
            "reference": messages[-1]["content"],
            "prediction": answer.answer,
            "exact": row.accuracy == 100.0,
            "hit_limit": answer.hit_limit,
        }
        for messages, answer, row in zip(conversations, answers, rows, strict=True)
    ]
    return Evaluation(
        model=model,
        dataset=version.reference,
        scores=summarise(rows),
        rows=len(rows),
        hit_limit=sum(answer.hit_limit for answer in answers),
        predictions=predictions,
    )


def read_conversations(path: Path, limit: int) -> list[list[dict[str, str]]]:
    """The conversations of a stored dataset; at most `limit`, -1 for all."""
    with path.open(encoding="utf-8") as file:
        lines = file if limit == -1 else islice(file, limit)
        return [json.loads(line)["messages"] for line in lines]


def evaluate_and_record(
    model: ModelRecord,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Evaluation:
    """Score a model in an MLflow run of its own: scores, predictions, the dataset, the model's name."""
    outcome = evaluate(model, version, generation, samples, on_events)
    tags = {"tuneline.model": model.name, "tuneline.dataset": version.reference}
    run_id = tracking.start_run(f"{model.name} on {version.name}", "evaluation", tags)
    status: TrainStatus = "failed"
    try:
        tracking.log_parameters(run_id, {"model": model.name, "dataset": version.reference, **generation.model_dump()})
        tracking.log_dataset(run_id, version, "evaluation")
        keep_evaluation(run_id, outcome, "tuned" if model.stage != "base" else "base", logged_model_id(model))
        status = "completed"
    finally:
        tracking.end_run(run_id, status)
    return outcome


def evaluate_endpoint(
    endpoint: Endpoint,
    version: DatasetVersion,
    generation: Generation,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Evaluation:
    """Score what is deployed at an endpoint by asking it, as its users do; recorded below the model's own run.

    Raises UserError if nothing is deployed there or if it does not answer.
    """
    deployment = endpoint.current_deployment
    if deployment is None:
        raise UserError(f"nothing is deployed at the endpoint '{endpoint.name}'", field="endpoint")
    model = models.find_model(deployment.model_name)
    conversations = read_conversations(version.path, samples)
    answers = ask_endpoint(endpoint, [messages[:-1] for messages in conversations], generation, on_events)
    outcome = _scored(deployment.model, version, conversations, answers)
    tags = {
        "tuneline.model": model.name,
        "tuneline.deployed_model": deployment.model,
        "tuneline.endpoint": endpoint.name,
        "tuneline.dataset": version.reference,
        **({"mlflow.parentRunId": model.run_id} if model.run_id else {}),
    }
    run_id = tracking.start_run(f"{deployment.model} on {version.name}", "evaluation", tags)
    status: TrainStatus = "failed"
    try:
        parameters = {
            "model": deployment.model,
            "target": deployment.target,
            "quantization": deployment.quantization or "none",
            "dataset": version.reference,
            "max_new_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
        }
        tracking.log_parameters(run_id, parameters)
        tracking.log_dataset(run_id, version, "evaluation")
        keep_evaluation(run_id, outcome, "deployed")
        status = "completed"
    finally:
        tracking.end_run(run_id, status)
    return outcome


def keep_evaluation(run_id: str, outcome: Evaluation, which: str, model_id: str | None = None) -> None:
    """Record scores as metrics (of the logged model too), and every prompt, reference and answer as a table."""
    figures = {f"{name}_{which}": value for name, value in outcome.figures.items()}
    tracking.log_scores(run_id, figures, model_id)
    client = tracking.mlflow_client()
    scores = outcome.model_dump(mode="json", exclude={"predictions"})
    client.log_dict(run_id, scores, f"evaluation/scores_{which}.json")
    rows = outcome.predictions
    table = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    if table:
        client.log_table(run_id, table, f"evaluation/predictions_{which}.json")

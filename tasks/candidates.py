"""What answers side by side: models, trains, base models and endpoints, each by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.datasets import DatasetVersion, Kind
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord
from configs.scoring import ScoringOptions
from methods.registry import find_method
from tasks import evaluation
from tasks.asking import ask_endpoint
from tasks.endpoints import list_endpoints, load_endpoint
from tasks.evaluation import Evaluation
from tasks.inference import Generation
from tasks.models import find_model

MOST = 5
PREFIX = "endpoint:"
EventHandler = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Candidate:
    """One of those that answer: a model, or an endpoint with whatever is deployed there."""

    name: str
    model: ModelRecord | None = None
    endpoint: Endpoint | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of rows that it can be evaluated on; an endpoint is asked conversations."""
        if self.model is not None:
            return find_method(self.model.method).evaluated_kinds
        return evaluation.endpoint_kinds(self._deployed())

    def evaluate(
        self,
        version: DatasetVersion,
        generation: Generation,
        samples: int,
        options: ScoringOptions,
        on_events: EventHandler,
    ) -> Evaluation:
        """Its answers to the first rows, scored; recorded nowhere."""
        if self.model is not None:
            return evaluation.evaluate(self.model, version, generation, samples, on_events, options)
        rows = evaluation.read_rows(version.path, samples)
        asked = [evaluation.asked_of_endpoint(row, version.path.parent) for row in rows]
        answers = ask_endpoint(self._deployed(), asked, generation, on_events)
        return evaluation.score_answers(self.name, version, rows, answers, options)

    def evaluate_and_record(
        self,
        version: DatasetVersion,
        generation: Generation,
        samples: int,
        options: ScoringOptions,
        on_events: EventHandler,
        tags: Mapping[str, str],
        *,
        perplexity: bool,
    ) -> Evaluation:
        """The same in an MLflow run of its own; the perplexity is that of a model, an endpoint does not tell it."""
        if self.model is not None:
            return evaluation.evaluate_and_record(
                self.model, version, generation, samples, on_events, options, perplexity=perplexity, tags=tags
            )
        found = self._deployed()
        return evaluation.evaluate_endpoint(found, version, generation, samples, on_events, options, tags=tags)

    def _deployed(self) -> Endpoint:
        if self.endpoint is None or self.endpoint.current_deployment is None:
            raise UserError(f"nothing is deployed at the endpoint '{self.name}'", field="endpoint")
        return self.endpoint


def find_candidates(references: Sequence[str], method: str | None = None) -> list[Candidate]:
    """The candidates of these names; a name that is no model's is looked for among the endpoints.

    `endpoint:NAME` is the endpoint, where a train has the same name. `method` is the one that asks base models,
    by default that of their type. Raises UserError for a name that is neither, for
    one named twice, and for more than `MOST`.
    """
    if len(references) > MOST:
        raise UserError(f"{len(references)} candidates are too many", field="MODEL", expected=f"at most {MOST}")
    found = [_find(reference, method) for reference in references]
    if method is not None and not any(each.model is not None and each.model.stage == "base" for each in found):
        raise UserError(
            "none of these is a base model; the others are asked by their own", field="--method", value=method
        )
    names = [candidate.name for candidate in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError("this candidate is named twice", field="MODEL", value=name, expected="each of them once")
    return found


def _find(reference: str, method: str | None) -> Candidate:
    if reference.startswith(PREFIX):
        return _of_endpoint(load_endpoint(reference.removeprefix(PREFIX)))
    try:
        model = find_model(reference)
    except UserError:
        endpoint = next((each.name for each in list_endpoints() if each.name == reference), None)
        if endpoint is None:
            raise
        return _of_endpoint(load_endpoint(endpoint))
    if method is not None and model.stage == "base":
        model = model.model_copy(update={"method": find_method(method).name})
    return Candidate(model.name, model=model)


def _of_endpoint(endpoint: Endpoint) -> Candidate:
    return Candidate(f"{PREFIX}{endpoint.name}", endpoint=endpoint)

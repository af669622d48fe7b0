"""When a line of models is trained again, what it must be better by, and what a retraining has come to."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from configs.endpoints import EndpointName
from configs.records import now
from configs.train import Real, Slug, Text, Whole, _no_bool

MetricName = Literal[
    "accuracy",
    "contains",
    "f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "rouge_1_recall",
    "rouge_2_recall",
    "rouge_l_recall",
    "bleu_4",
]
AfterPromotion = Literal["registered", "complete", "deployed"]
RetrainResult = Literal["promoted", "refused", "skipped", "failed", "not_deployed", "rolled_back"]


def _fixed_version(reference: str) -> str:
    name, _, digest = reference.partition("@")
    if not (name and digest):
        raise PydanticCustomError("fixed_version", "this names no fixed version; `NAME@DIGEST` does")
    return reference


def _moving(reference: str) -> str:
    # A path may hold an @, the name of a dataset may not.
    if "@" in reference and "/" not in reference:
        raise PydanticCustomError("moving_dataset", "a fixed version never has new rows; leave `@DIGEST` out")
    return reference


class RetrainPolicy(BaseModel):
    """How a line of models is retrained. Kept as `policy.yaml`; the form of `retrain/LINE` is made of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    line: Slug = Field(title="Line", description="Registered model, which has the name of its trains.")
    dataset: Annotated[Text, AfterValidator(_moving)] = Field(
        title="Dataset",
        description="Name of a registered dataset, whose newest version is trained on, or the absolute path of a file "
        "that is read again each time.",
    )
    evaluation_dataset: Annotated[Text, AfterValidator(_fixed_version)] = Field(
        title="Held-out dataset",
        description="NAME@DIGEST of the rows that champion and challenger answer; a fixed version, so that the figures "
        "of one year can be compared.",
    )
    metric: MetricName = Field(default="accuracy", title="Metric", description="What must be better, in percent.")
    margin: Real = Field(
        default=1.0,
        ge=0,
        le=100,
        title="Margin",
        description="Points of the metric by which the challenger must be better on average.",
    )
    confidence: Annotated[float, BeforeValidator(_no_bool)] = Field(
        default=0.95,
        gt=0.5,
        lt=1,
        title="Confidence",
        description="Level of the interval around that difference, the lower end of which must be above 0.",
    )
    then: AfterPromotion = Field(
        default="registered",
        title="After a promotion",
        description="What follows: nothing (registered), a complete model, or a complete model that is deployed.",
    )
    endpoint: EndpointName | None = Field(
        default=None, title="Endpoint", description="Endpoint to deploy to. Empty: one named after the line."
    )
    seed: Whole = Field(
        default=42,
        ge=0,
        le=2**32 - 1,
        title="Seed",
        description="Start of the random choices of the comparison; the same answers then give the same interval.",
    )

    @model_validator(mode="after")
    def _check(self) -> RetrainPolicy:
        if self.endpoint is not None and self.then != "deployed":
            raise PydanticCustomError("endpoint", "an endpoint is named, but nothing is deployed: set then: deployed")
        return self


class PairedComparison(BaseModel):
    """Challenger and champion on the same rows. Figures in percent, differences in points (challenger - champion)."""

    champion: str
    challenger: str
    metric: MetricName
    rows: int = Field(description="Rows that both answered and that neither was trained on.")
    trained_rows: int = Field(default=0, description="Held-out rows left out, because one of them was trained on them.")
    champion_mean: float
    challenger_mean: float
    difference: float
    low: float = Field(description="Lower end of the interval.")
    high: float
    confidence: float
    better: int = Field(description="Rows on which the challenger is better.")
    worse: int
    ties: int
    promoted: bool
    reason: str


class RetrainAttempt(BaseModel):
    """One retraining under way: what a rerun needs to take it up. Kept as `attempt.json` until it has ended."""

    model_config = ConfigDict(extra="forbid")

    policy: RetrainPolicy
    champion: str = Field(description="Name of the model to beat.")
    dataset: str = Field(description="The version that is trained on.")
    began: datetime = Field(default_factory=now)
    train: str | None = Field(default=None, description="Id of the challenger's train.")
    challenger: str | None = Field(default=None, description="Name of the model it made.")
    comparison: PairedComparison | None = None
    model: str | None = Field(default=None, description="Name of the model that is to be champion.")


class RetrainOutcome(BaseModel):
    """What a retraining has come to: one line of `history.jsonl`."""

    line: str
    result: RetrainResult
    reason: str
    at: datetime = Field(default_factory=now)
    dataset: str | None = Field(default=None, description="The version that was trained on.")
    champion: str | None = Field(default=None, description="The model there was before.")
    challenger: str | None = None
    model: str | None = Field(default=None, description="The champion from now on, if another one.")
    train: str | None = None
    endpoint: str | None = None
    comparison: PairedComparison | None = None
    policy: RetrainPolicy | None = None

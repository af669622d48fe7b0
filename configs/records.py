"""What Tuneline keeps of trains and models: small, typed, readable files."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.train import TrainConfig

TrainStatus = Literal["running", "completed", "failed", "cancelled", "interrupted"]
ModelStage = Literal["base", "trained", "customized", "complete"]
QueueName = Literal["high", "default", "low"]
"""The work queues of a pool, in the order in which their trains get GPUs."""


def now() -> datetime:
    """The time a record is stamped with."""
    return datetime.now(UTC)


class ModelRecord(BaseModel):
    """A model: where its weights lie, what it is and where it comes from. Kept as `tuneline.json` beside them.

    `trained` is the product of full-parameter training before it is saved as a complete model; it is in no registry.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    stage: ModelStage
    path: Path
    line: str = Field(description="The registered model in MLflow whose versions succeed each other.")
    base: str = Field(description="Name of the base model it started from.")
    base_path: Path = Field(description="Folder of that base model.")
    method: str = "sft"
    adapter: bool = Field(default=False, description="Whether `path` holds an adapter on top of the base.")
    dtype: str = "auto"
    parent: str | None = Field(default=None, description="Name of the model it was made from.")
    train: str | None = Field(default=None, description="Id of the train it came out of.")
    run_id: str | None = Field(default=None, description="MLflow run of that train.")
    step: int | None = Field(default=None, description="Step of that train whose weights it has.")
    from_checkpoint: bool = Field(
        default=False, description="Whether it was made of a checkpoint by itself; the train's name means another."
    )
    dataset: str | None = None
    created: datetime = Field(default_factory=now)
    registered_version: str | None = None
    evaluation: dict[str, float] = Field(default_factory=dict, description="Scores in percent.")
    evaluated: str | None = Field(
        default=None,
        description="The model whose answers were scored: itself, or the one that it was proved to be equal to.",
    )
    verification: dict[str, Any] = Field(default_factory=dict)


class CodeRecord(BaseModel):
    """The Python code that a base model brings and that the user has allowed: digest of all files, sha256 of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    files: dict[str, str]


class ServedAs(BaseModel):
    """Where and how a train that goes as far as an endpoint is to be served; asked beside its configuration."""

    model_config = ConfigDict(extra="forbid")

    endpoint: str | None = None
    target: str | None = Field(default=None, description="None: the first of the method's.")
    quantization: str | None = None
    port: int | None = None


class SweepPlace(BaseModel):
    """Which train of which sweep a train is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sweep: str
    number: int


class Resolution(BaseModel):
    """What a parameter that was given as `auto` became in a stage, and what decided it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    origin: str = Field(description="What decided it, such as `hardware`.")
    reason: str


class TrainRecord(BaseModel):
    """One train on its way: everything that a rerun needs to pick it up. Kept as `train.json` in its folder."""

    model_config = ConfigDict(extra="forbid")

    id: str
    config: TrainConfig
    origins: dict[str, str] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    status: TrainStatus = "running"
    reason: str | None = Field(default=None, description="Why it failed or was cancelled.")
    created: datetime = Field(default_factory=now)
    ended: datetime | None = None
    attempts: int = 1
    queue: QueueName = Field(default="default", description="Work queue; says who gets a GPU first.")
    waiting: str | None = Field(default=None, description="What it waits for before it goes on.")
    gpus: list[str] = Field(default_factory=list, description="CUDA devices that the newest attempt was given.")
    run_id: str = Field(description="MLflow run.")
    code_version: str | None = Field(default=None, description="Version of Tuneline's code that began it.")
    flow_run_id: str | None = Field(default=None, description="Prefect flow run of the newest attempt.")
    earlier_flow_runs: list[str] = Field(default_factory=list, description="Prefect flow runs of earlier attempts.")
    served_as: ServedAs = Field(default_factory=ServedAs)
    crash_resumes: int = Field(default=0, description="How often it was taken up by itself after a crash.")
    after_crash: str | None = Field(default=None, description="What was decided after its newest crash, and why.")
    sweep: SweepPlace | None = Field(default=None, description="The sweep that has begun it.")
    resolved: dict[str, Resolution] = Field(
        default_factory=dict, description="What parameters given as `auto` became in the newest attempt, by name."
    )
    base: str | None = Field(default=None, description="Name of the base model.")
    base_path: Path | None = None
    remote_code: CodeRecord | None = Field(default=None, description="Code of the base model that the train runs.")
    dataset: str | None = None
    validation_dataset: str | None = None
    evaluation_dataset: str | None = None
    model: str | None = Field(default=None, description="Name of the newest model it made.")
    evaluation: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="Scores in percent, by `base` and `tuned`."
    )
    outcome: dict[str, float] = Field(
        default_factory=dict,
        description="Steps, seconds and mean loss; with keep_best the best step, its figure and that of the last one.",
    )
    stopped: str | None = Field(default=None, description="Why the training ended before its last step.")

    @property
    def template_date(self) -> date:
        """The date that its chat template prints, in training and in evaluation, on whatever day they run."""
        return self.config.template_date or self.created.date()

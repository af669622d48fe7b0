"""The configuration of one train: the single source of the form, the files, the command line and the tables.

A field refuses only what is impossible. `typical` holds the documented range and its source; a value outside
of it gives a warning (`configs.resolve`).
"""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from configs.alerts import Subscription
from configs.datasets import RequestedShape
from configs.endpoints import EndpointName

DX = "DeepExtension, parameter reference table"
QIANFAN = "Baidu Qianfan, limits of Baichuan2-7B-Chat"
PANGU = "Huawei Pangu, supervised fine-tuning parameters"

DATASETS = ("dataset", "validation_dataset", "evaluation_dataset")
"""The fields that name rows."""

TRAIN_NAME_BYTES = 100
"""Longest name of a train in UTF-8: folders are named BASE_TRAIN_YYYYMMDD_xxxx_s_xxxx_d_xxxx_QUANT after it."""


_GIVEN_TO_TEMPLATES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""What every rendering gives a chat template itself."""


class Typical(TypedDict):
    """A documented range: `low`..`high` or `values`; `also` lists special values that are fine."""

    low: NotRequired[float]
    high: NotRequired[float]
    values: NotRequired[list[float]]
    multiple_of: NotRequired[int]
    also: NotRequired[list[float]]
    source: str


class Contradiction(TypedDict):
    """Fields whose values cannot stand together, why, and the way out."""

    fields: list[str]
    problem: str
    mend: str


def _extra(typical: Typical) -> dict[str, Any]:
    return {"typical": dict(typical)}


def _no_bool(value: object) -> object:
    # pydantic reads True as 1: `batch_size: true` would train with a batch of one.
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "a number is needed, not true or false")
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "0 would leave no rows")
    return value


def _slug(value: str) -> str:
    if not re.fullmatch(r"[^\W_][\w.-]*", value) or value.endswith(".") or ".." in value:
        raise PydanticCustomError("slug", "not usable as a name")
    return value


def _train_name(value: str) -> str:
    if len(value.encode()) > TRAIN_NAME_BYTES:
        raise PydanticCustomError("train_name", "too long for the folders that are named after it")
    return value


def _switch_word(value: object) -> object:
    # YAML 1.1 reads `on` and `off` as true and false.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _template_variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in _GIVEN_TO_TEMPLATES:
            raise PydanticCustomError("template_variable", "not a variable that a chat template can be given")
    return value


def _targets(value: object) -> object:
    """`q_proj,v_proj` and `[q_proj, v_proj]` mean the same; `all-linear` stays as it is."""
    if isinstance(value, str) and value != "all-linear":
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list) and not (value and all(_is_module(part) for part in value)):
        raise PydanticCustomError("lora_targets", "not names of modules")
    return value


def _is_module(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.]+", name) is not None


Whole = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[float, BeforeValidator(_no_bool)]
# The bounds stand first: behind a validator, or outside of `| None`, they would be checked but be missing
# from the JSON schema, of which the form and the tables are made.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]
NotNegative = Annotated[int, Field(ge=0), BeforeValidator(_no_bool)]
Share = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_no_bool)]
Rows = Annotated[
    int,
    Field(ge=-1, json_schema_extra={"limits": "-1 for all, or a whole number ≥ 1", "not": {"const": 0}}),
    BeforeValidator(_no_bool),
    AfterValidator(_not_zero),
]
Slug = Annotated[
    str,
    AfterValidator(_slug),
    Field(
        min_length=1,
        max_length=60,
        json_schema_extra={
            "limits": "letters, digits, - _ . (at most 60; first a letter or digit, no `..`, no dot at the end)",
            # What `_slug` says, for the form; not a `pattern=`, because pydantic's expressions look neither way.
            "pattern": r"^(?!.*\.\.)[^\W_][\w.-]*(?<!\.)$",
        },
    ),
]
TrainName = Annotated[
    Slug,
    AfterValidator(_train_name),
    Field(
        json_schema_extra={
            "limits": f"letters, digits, - _ . (at most 60, and {TRAIN_NAME_BYTES} bytes in UTF-8: 33 Chinese "
            "characters; first a letter or digit, no `..`, no dot at the end)",
        },
    ),
]
Targets = Annotated[
    str | list[str],
    BeforeValidator(_targets),
    Field(json_schema_extra={"limits": "all-linear, or names of modules such as q_proj,v_proj"}),
]
Text = Annotated[str, Field(min_length=1)]
ThinkingMode = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch_word)]
TemplateVariables = Annotated[
    dict[str, Any],
    AfterValidator(_template_variables),
    Field(json_schema_extra={"limits": "an object such as {reasoning_effort: low}, by the template's own names"}),
]
CurveName = Annotated[str, Field(pattern=r"^eval_\w+$", json_schema_extra={"limits": "the name of a curve: eval_…"})]


class Hyperparameters(BaseModel):
    """What steers the training itself. Lengths are in tokens, intervals in optimizer steps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tuning: Literal["full", "lora"] = Field(
        default="lora",
        title="Tuning",
        description="What is updated: every weight (full) or a low-rank adapter beside frozen weights (lora).",
    )
    load_in_4bit: bool = Field(
        default=False,
        title="Load in 4 bit",
        description="Hold the frozen base model in 4 bits (NF4) while a LoRA adapter is trained. Saves memory.",
    )
    lora_rank: Whole = Field(
        default=8,
        ge=1,
        title="LoRA rank",
        description="Rank of the adapter's matrices. A higher one learns more and takes more memory.",
        json_schema_extra=_extra({"values": [4, 8, 16, 32, 64], "source": f"{DX}; {PANGU}"}),
    )
    lora_alpha: Positive | None = Field(
        default=None,
        title="LoRA alpha",
        description="Scale of the adapter: it counts alpha / rank times. Not set: 2 × lora_rank.",
        json_schema_extra=_extra({"values": [8, 16, 32, 64], "source": QIANFAN}),
    )
    lora_dropout: Real = Field(
        default=0.0,
        ge=0,
        lt=1,
        title="LoRA dropout",
        description="Share of the adapter's inputs that is dropped in a training step, against overfitting.",
        json_schema_extra=_extra({"low": 0.1, "high": 0.5, "also": [0], "source": QIANFAN}),
    )
    lora_targets: Targets = Field(
        default="all-linear",
        title="LoRA targets",
        description="Which modules get an adapter: all-linear, or names such as q_proj,v_proj; embed_tokens and "
        "experts (experts.down_proj) too, the output head not.",
    )
    max_seq_length: Whole = Field(
        default=1024,
        ge=2,
        title="Sequence length",
        description="Longest row in tokens, prompt and answer together. Shorter is faster.",
        json_schema_extra=_extra({"values": [512, 1024, 2048, 4096], "source": f"{DX}; {QIANFAN}"}),
    )
    max_input_length: Positive | None = Field(
        default=None,
        title="Input length",
        description="Longest prompt in tokens. Not set: only max_seq_length limits it.",
        json_schema_extra=_extra({"low": 256, "high": 2048, "source": DX}),
    )
    max_content_length: Positive | None = Field(
        default=None,
        title="Content length",
        description="Longest training content (the answer) in tokens. Not set: only max_seq_length limits it.",
        json_schema_extra=_extra({"low": 256, "high": 2048, "source": DX}),
    )
    over_length: Literal["drop", "truncate", "error"] = Field(
        default="drop",
        title="Rows over length",
        description="What happens to rows over a length: left out (drop), cut (truncate), or the train stops (error).",
    )
    max_samples: Rows = Field(
        default=-1,
        title="Training rows",
        description="How many rows of the dataset are trained on, from its start; -1: all.",
    )
    num_generations: Whole = Field(
        default=2,
        ge=1,
        title="Generations",
        description="Answers generated for reward or validation; in sft: validation rows answered and "
        "recorded at "
        "every evaluation.",
        json_schema_extra=_extra({"low": 1, "high": 10, "source": DX}),
    )
    max_grad_norm: Real = Field(
        default=1.0,
        ge=0,
        title="Gradient clipping",
        description="Gradients are scaled down to this norm; 0: never.",
        json_schema_extra=_extra({"low": 0.5, "high": 5.0, "source": DX}),
    )
    epochs: Real = Field(
        default=1,
        gt=0,
        title="Epochs",
        description="How often the dataset is gone through; max_steps overrides it.",
        json_schema_extra=_extra({"low": 1, "high": 50, "source": f"{DX}; {PANGU}"}),
    )
    max_steps: Positive | None = Field(
        default=None,
        title="Training steps",
        description="Optimizer steps in all; overrides epochs. Not set (or -1): epochs decide.",
        json_schema_extra=_extra({"low": 100, "high": 50000, "source": DX}),
    )
    batch_size: Whole = Field(
        default=8,
        ge=1,
        title="Batch size",
        description="Rows in one forward pass on one device.",
        json_schema_extra=_extra({"low": 1, "high": 64, "source": DX}),
    )
    grad_accum_steps: Whole = Field(
        default=1,
        ge=1,
        title="Gradient accumulation",
        description="Batches added up before the weights are updated once.",
        json_schema_extra=_extra({"low": 1, "high": 16, "source": DX}),
    )
    learning_rate: Real = Field(
        default=1e-4,
        gt=0,
        le=1,
        title="Learning rate",
        description="Size of an update at the peak of the schedule. Too high diverges, too low learns nothing.",
        json_schema_extra=_extra(
            {
                "low": 1e-6,
                "high": 1e-3,
                "source": f"{DX} (1e-4, 5e-5, 2e-5); {QIANFAN} (default 1e-6); ERNIE LoRA",
            }
        ),
    )
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = Field(
        default="cosine",
        title="Learning rate schedule",
        description="How the learning rate moves after the warm-up.",
    )
    lr_decay_ratio: Real = Field(
        default=0.0,
        ge=0,
        le=1,
        title="Learning rate decay ratio",
        description="The schedule never falls below learning_rate × this ratio.",
    )
    warmup_steps: NotNegative | None = Field(
        default=None,
        title="Warm-up steps",
        description="Steps until the learning rate is reached; overrides warmup_ratio. Not set: the ratio decides.",
        json_schema_extra=_extra({"low": 0, "high": 5000, "source": DX}),
    )
    warmup_ratio: Real = Field(
        default=0.03,
        ge=0,
        le=1,
        title="Warm-up ratio",
        description="Share of all steps until the learning rate is reached; warmup_steps overrides it.",
        json_schema_extra=_extra({"low": 0.01, "high": 0.2, "source": DX}),
    )
    weight_decay: Real = Field(
        default=0.0,
        ge=0,
        title="Weight decay",
        description="Pull of the weights towards zero, against overfitting.",
        json_schema_extra=_extra({"low": 0.001, "high": 1, "also": [0], "source": QIANFAN}),
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "sgd"] = Field(
        default="adamw", title="Optimizer", description="Algorithm that updates the weights."
    )
    checkpoint_steps: Whole = Field(
        default=100,
        ge=1,
        title="Checkpoint every",
        description="Steps between two checkpoints, from which an interrupted train goes on.",
        json_schema_extra=_extra({"low": 1000, "high": 2000, "multiple_of": 10, "source": PANGU}),
    )
    keep_checkpoints: Whole = Field(
        default=2,
        ge=1,
        title="Checkpoints kept",
        description="Beyond this number the oldest are deleted.",
    )
    evaluation_steps: Positive | None = Field(
        default=None,
        title="Evaluate every",
        description="Steps between two evaluations on the validation rows. Not set: at the end of every epoch.",
    )
    keep_best: CurveName | None = Field(
        default=None,
        title="Keep the best by",
        description="Metric of the evaluations while training, such as eval_loss or eval_reward_accuracy: a checkpoint "
        "is saved at every evaluation, and the model is made of the best one. Not set: of the last step.",
    )
    early_stopping_patience: Positive | None = Field(
        default=None,
        title="Early stopping patience",
        description="The training ends after this many evaluations in a row that do not improve the metric of "
        "keep_best (not set: eval_loss, with rewards eval_reward). Not set: never early.",
        json_schema_extra=_extra({"low": 1, "high": 10, "source": "transformers, EarlyStoppingCallback"}),
    )
    early_stopping_threshold: Real = Field(
        default=0.0,
        ge=0,
        title="Early stopping threshold",
        description="An evaluation improves the metric if it is better than the best one before by more than this.",
    )
    stop_after_nonfinite: Whole = Field(
        default=1,
        ge=1,
        title="Stop after non-finite updates",
        description="An update whose loss or gradient is NaN or infinite is left out; the train stops at the given "
        "number of them, 1 being the first.",
    )
    logging_steps: Whole = Field(
        default=1, ge=1, title="Log every", description="Steps between two points of the recorded curves."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        title="Gradient checkpointing",
        description="Compute activations again in the backward pass: less memory, slower.",
    )
    group_by_length: bool = Field(
        default=True,
        title="Group by length",
        description="Put rows of similar length in a batch: less padding.",
    )
    train_on: Literal["all", "last"] = Field(
        default="all",
        title="Train on",
        description="Which answers of a conversation are trained: all of them, or the last. An answer whose row gives "
        "it the weight 0 is never trained.",
    )
    turns: Literal["all", "last"] = Field(
        default="all",
        title="Rewritten turns",
        description="Where the chat template rewrites earlier turns (thoughts are stripped), a conversation becomes "
        "one row for each answer (all), or one row for the last answer (last).",
    )
    thinking: ThinkingMode = Field(
        default="auto",
        title="Thinking",
        description="Whether answers have a thought (reasoning) before them, in training, evaluation and serving "
        "alike. auto: as the training rows have them.",
    )
    chat_template_kwargs: TemplateVariables = Field(
        default_factory=dict,
        title="Template variables",
        description="Values of variables that the model's chat template reads, the same in training, evaluation and "
        "serving.",
    )
    seed: Whole = Field(
        default=42,
        ge=0,
        le=2**32 - 1,
        title="Seed",
        description="Start of every random choice; the same seed repeats a train.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        title="Number type",
        description="Numbers computed with; auto takes the best one that the hardware has.",
    )

    @model_validator(mode="after")
    def _check(self) -> Hyperparameters:
        _refuse(_hyperparameter_contradictions(self))
        return self


class TrainConfig(BaseModel):
    """All that one train needs; recorded with it, so that it can be repeated from the record alone."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: TrainName = Field(title="Name", description="Name of the train, part of the name of its model.")
    description: str = Field(default="", max_length=500, title="Description", description="What this train is for.")
    method: Slug = Field(default="sft", title="Training method", description="A registered training method.")
    base_model: Text = Field(
        title="Base model",
        description="A registered base model, a local model folder, or a hub id OWNER/NAME.",
    )
    dataset: Text = Field(title="Dataset", description="A registered dataset or a file with the training rows.")
    prompt_column: Text | None = Field(
        default=None,
        title="Prompt column",
        description="Column of the prompt. Not set: found from the dataset's shape.",
    )
    completion_column: Text | None = Field(
        default=None,
        title="Answer column",
        description="Column of the answer. Not set: found from the dataset's shape.",
    )
    dataset_shape: RequestedShape = Field(
        default="auto",
        title="Dataset shape",
        description="How a row is laid out; auto recognises it from the first rows.",
    )
    validation_dataset: Text | None = Field(
        default=None, title="Validation dataset", description="Rows for the validation loss while training."
    )
    validation_split: Share | None = Field(
        default=None,
        title="Validation split",
        description="Share of the training rows held back for the validation loss: 0.1 is 10 %.",
    )
    evaluation_dataset: Text | None = Field(
        default=None,
        title="Evaluation dataset",
        description="Test rows, scored with the base model and after training.",
    )
    evaluation_samples: Rows = Field(
        default=-1,
        title="Evaluation rows",
        description="How many rows of the evaluation dataset are scored; -1: all.",
    )
    evaluation_by: Text | None = Field(
        default=None,
        title="Evaluate by",
        description="Columns of the evaluation rows, separated by commas: the rows with each of their values are "
        "scored apart as well.",
    )
    stop_words: Text | None = Field(
        default=None,
        title="Stop words",
        description="Words that scoring leaves out: zh, en, zh,en, or a file with one a line. Not set: none.",
    )
    max_new_tokens: Whole = Field(
        default=128,
        ge=1,
        title="Answer length",
        description="Longest answer in evaluations, in tokens.",
    )
    template_date: date | None = Field(
        default=None,
        title="Template date",
        description="Date that the chat template prints in training and evaluation, where it prints today's. Not set: "
        "the day on which the training run begins.",
    )
    allow_refused_rows: bool = Field(
        default=False,
        title="Allow refused rows",
        description="Train although rows of the dataset were refused; otherwise the train does not start.",
    )
    through: Literal["customized", "complete", "deployed"] | None = Field(
        default=None,
        title="Through",
        description="How far the train goes. Not set: customized for an adapter, complete for full tuning.",
    )
    endpoint: EndpointName | None = Field(
        default=None, title="Endpoint", description="Endpoint to deploy to. Not set: one named by the train."
    )
    gpus: NotNegative | None = Field(
        default=None,
        title="GPUs",
        description="How many GPUs of the host it holds while it runs; it waits until they are free. Not set: one, "
        "on a host that has any.",
    )
    processes: Whole = Field(
        default=1,
        ge=1,
        le=64,
        title="Processes",
        description="How many processes of the host the training is spread over, each with batch_size rows at a time; "
        "where there are GPUs, each has one.",
    )
    distribution: Literal["none", "ddp", "fsdp", "deepspeed"] = Field(
        default="none",
        title="Distribution",
        description="How several processes share the training: each has the whole model (ddp), or a part of it (fsdp, "
        "deepspeed).",
    )
    resume_after_crash: Whole = Field(
        default=0,
        ge=0,
        le=100,
        title="Resume after a crash",
        description="How many times the train is taken up again by itself, from its newest checkpoint, after its host "
        "or its process has died. Takes a Prefect server (`tuneline up`).",
    )
    alerts: list[Subscription] = Field(
        default_factory=list,
        title="Alerts",
        description="Who is told when it is completed, has failed, was cancelled, or when retraining promotes a better "
        "model.",
        json_schema_extra={"limits": "a list such as [{to: ops, on: [failed, promoted]}], `to` being a channel"},
    )
    hyperparameters: Hyperparameters = Field(
        default_factory=Hyperparameters,
        title="Hyper-parameters",
        description="What steers the training itself.",
    )
    method_params: dict[str, Any] = Field(
        default_factory=dict, title="Method parameters", description="Parameters that only this method has."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        _refuse(_train_contradictions(self))
        return self


def effective_through(config: TrainConfig) -> Literal["customized", "complete", "deployed"]:
    """How far the train goes, with the default for its tuning filled in."""
    if config.through is not None:
        return config.through
    return "complete" if config.hyperparameters.tuning == "full" else "customized"


def path_of(config: TrainConfig) -> list[str]:
    """The stages of the lifecycle that the train's model goes through, in order, without the base."""
    stages = ["customized", "complete", "deployed"]
    first = 1 if config.hyperparameters.tuning == "full" else 0
    return stages[first : stages.index(effective_through(config)) + 1]


def _refuse(found: list[Contradiction]) -> None:
    if found:
        text = "; ".join(item["problem"] for item in found)
        raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": found})


def _hyperparameter_contradictions(given: Hyperparameters) -> list[Contradiction]:
    found: list[Contradiction] = []
    if given.tuning == "full" and given.load_in_4bit:
        found.append(
            {
                "fields": ["tuning", "load_in_4bit"],
                "problem": "weights held in 4 bits cannot be trained in full; only an adapter beside them can",
                "mend": "set tuning: lora, or load_in_4bit: false",
            }
        )
    for name in ("max_input_length", "max_content_length"):
        length = getattr(given, name)
        if length is not None and length > given.max_seq_length:
            found.append(
                {
                    "fields": [name, "max_seq_length"],
                    "problem": f"{name} ({length}) is more than the whole row may have "
                    f"(max_seq_length {given.max_seq_length})",
                    "mend": f"raise max_seq_length to at least {length}, or lower {name}",
                }
            )
    return found


def _train_contradictions(given: TrainConfig) -> list[Contradiction]:
    found: list[Contradiction] = []
    if given.hyperparameters.tuning == "full" and given.through == "customized":
        found.append(
            {
                "fields": ["through", "hyperparameters.tuning"],
                "problem": "full-parameter training leaves self-contained weights, there is no customized model",
                "mend": "set through: complete (or leave it out)",
            }
        )
    if given.validation_dataset is not None and given.validation_split is not None:
        found.append(
            {
                "fields": ["validation_dataset", "validation_split"],
                "problem": "validation rows come either from a dataset of their own or from a split, not from both",
                "mend": "keep one of the two",
            }
        )
    found += _spreading_contradictions(given)
    found += _evaluation_contradictions(given)
    if given.endpoint is not None and given.through != "deployed":
        found.append(
            {
                "fields": ["endpoint", "through"],
                "problem": "an endpoint is named, but the train does not go as far as deployed",
                "mend": "set through: deployed, or leave endpoint out",
            }
        )
    if given.prompt_column is not None and given.prompt_column == given.completion_column:
        found.append(
            {
                "fields": ["prompt_column", "completion_column"],
                "problem": "prompt and answer are the same column, so the model would learn to repeat the prompt",
                "mend": "name two different columns",
            }
        )
    return found


def _evaluation_contradictions(given: TrainConfig) -> list[Contradiction]:
    """What takes evaluations while training, where there are no rows for them."""
    if given.validation_dataset is not None or given.validation_split is not None:
        return []
    wanted = [
        name for name in ("keep_best", "early_stopping_patience") if getattr(given.hyperparameters, name) is not None
    ]
    return [
        {
            "fields": [f"hyperparameters.{name}", "validation_dataset", "validation_split"],
            "problem": f"{name} compares evaluations while training, and there are no validation rows",
            "mend": f"set validation_dataset or validation_split, or leave {name} out",
        }
        for name in wanted
    ]


def _spreading_contradictions(given: TrainConfig) -> list[Contradiction]:
    found: list[Contradiction] = []
    fields = ["processes", "distribution"]
    if given.processes > 1 and given.distribution == "none":
        problem = "it is not said how the processes share the training"
        found.append({"fields": fields, "problem": problem, "mend": "set distribution: ddp, or processes: 1"})
    if given.processes == 1 and given.distribution != "none":
        problem = "one process has nobody to share the training with"
        found.append({"fields": fields, "problem": problem, "mend": "set processes: 2, or distribution: none"})
    if given.gpus and given.processes > 1 and given.gpus != given.processes:
        found.append(
            {
                "fields": ["gpus", "processes"],
                "problem": f"each process has one GPU, and {given.gpus} are asked for {given.processes} processes",
                "mend": f"set gpus: {given.processes}, or leave it out",
            }
        )
    return found

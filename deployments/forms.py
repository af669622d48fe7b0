"""The forms of the Prefect page: JSON schemas made from the pydantic models and the manifests of the methods.

The server checks every run against them (Prefect reads 2020-12). What its page (V2) draws well decides their shape:

- Everything is written out in place, because the server accepts null for an optional field only where it is.
- An optional field is its plain type without a default: an empty box, and a refusal that names the limit. As
  `anyOf` with null it would be two tabs, and every refusal "not valid under any of the given schemas".
- Every field has a position; a form in which some have none is drawn in a scrambled order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from configs.base_models import ModelType
from configs.datasets import RequestedShape
from configs.endpoints import QUANTIZATIONS, EndpointName, Quantization, Target
from configs.errors import UserError
from configs.method_values import OWN
from configs.parameter_schemas import MODEL, PATH, json_schema
from configs.profiles import RecordedProfile
from configs.records import QueueName
from configs.reference import typical_of, typical_text
from configs.resolve import ResolvedTrain, resolve_train
from configs.train import Hyperparameters, Slug, Text, TrainConfig
from methods.registry import Method, find_method

Through = Literal["customized", "complete", "deployed"]
Schema = dict[str, Any]

FORM = "form"

# What most people set, in the order of the form. All other fields follow, as the models declare them.
_COMMON_TRAIN = (
    "name",
    "description",
    "base_model",
    "dataset",
    "prompt_column",
    "completion_column",
    "validation_dataset",
    "validation_split",
    "evaluation_dataset",
    "hyperparameters",
    "method_params",
)
_COMMON_HYPER = (
    "tuning",
    "epochs",
    "max_steps",
    "learning_rate",
    "batch_size",
    "grad_accum_steps",
    "max_seq_length",
    "lora_rank",
    "lora_alpha",
    "load_in_4bit",
    "seed",
)
# `through` is the deployment's own path; `endpoint` is asked for beside the train.
_NOT_ASKED = ("through", "endpoint", "method")
_OF_SPREADING = ("processes", "distribution")
_KEPT = (
    "type",
    "enum",
    "const",
    "default",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "pattern",
    "items",
    "format",
    "not",
    "examples",
)


class ServedAt(BaseModel):
    """Where and how a model is served; what the flow `deployed` asks beside the train or the model."""

    endpoint: EndpointName | None = Field(
        default=None,
        title="Endpoint",
        description="Endpoint to deploy to, such as home-commands. Empty: one named after the model's line.",
    )
    target: Target | None = Field(
        default=None,
        title="Target",
        description="What serves the model. Empty: the first target that its method names. `tuneline targets` tells "
        "which ones are ready on a host; llama.cpp and ollama take complete models only.",
    )
    quantization: Quantization | None = Field(
        default=None,
        title="Quantization",
        description="How the weights are held while serving. Empty: as they are. "
        + "; ".join(f"{target}: {', '.join(kinds)}" for target, kinds in QUANTIZATIONS.items() if kinds)
        + ".",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, title="Port", description="Port of a new endpoint. Empty: a free one from 8100."
    )


class WithProfile(BaseModel):
    """What every form of a train asks beside it."""

    profile: Slug | None = Field(
        default=None,
        title="Profile",
        description="Parameters that were saved with `tuneline profiles save`; they count where the form is left at "
        "its default. Empty: none.",
    )


class CompleteFromModel(BaseModel):
    """What the flow `complete` needs to start from a model."""

    model: Text = Field(
        title="Customized model", description="Name of a customized model, LINE@ALIAS, or the train that made it."
    )
    checkpoint: Text | None = Field(
        default=None,
        title="Checkpoint",
        description="Step of a checkpoint of the train, `best` or `last`: the model is made of it. Empty: of what the "
        "train has left.",
    )


class DeployedFromModel(ServedAt):
    """What the flow `deployed` needs to start from a model."""

    model: Text = Field(
        title="Model", description="Name of a base, customized or complete model, LINE@ALIAS, or a train."
    )


class Resume(BaseModel):
    """What the flow `resume` needs to go on with a train that somebody names."""

    train: Text = Field(title="Train", description="Id of the train, or its name for the newest one of that name.")


class ResumeAfterCrash(BaseModel):
    """What the flow `resume` needs to decide about a train that crashed."""

    crashed_flow_run: Text = Field(title="Crashed flow run", description="Id of the flow run that has crashed.")


class Undeploy(BaseModel):
    """What the flow `undeploy` needs."""

    endpoint: EndpointName = Field(title="Endpoint", description="Name of the endpoint; its address is kept.")


class AddDataset(BaseModel):
    """What the flow `add-dataset` needs."""

    file: Text = Field(
        title="File",
        description="File of rows (JSON Lines, JSON, CSV, Excel, Parquet, plain text), or folder or archive of rows "
        "and images, on the host that the worker runs on; its absolute path.",
    )
    name: Slug | None = Field(default=None, title="Name", description="Name of the dataset. Empty: the file's.")
    prompt_column: Text | None = Field(
        default=None, title="Prompt column", description="Column of the prompt. Empty: found from the shape."
    )
    completion_column: Text | None = Field(
        default=None, title="Answer column", description="Column of the answer. Empty: found from the shape."
    )
    shape: RequestedShape = Field(
        default="auto", title="Shape", description="How a row is laid out; auto recognises it from the first rows."
    )
    allow_refused: bool = Field(
        default=False,
        title="Allow refused rows",
        description="Store the good rows although others are refused; otherwise nothing is stored.",
    )


class Sweep(BaseModel):
    """What the flow `sweep` needs."""

    source: Text = Field(
        title="Train",
        description="Train file (YAML) on the host that the worker runs on, its absolute path; or a train there is.",
    )
    over: list[Text] = Field(
        default_factory=list,
        title="Values to try",
        description="One parameter a line, such as learning_rate=1e-5,1e-4,1e-3; every combination is a train. Empty: "
        "the `sweep:` section of the file.",
    )
    changes: list[Text] = Field(
        default_factory=list, title="Changes", description="name=value for all trains, such as epochs=2."
    )
    by: Text | None = Field(
        default=None,
        title="Best by",
        description="Figure that says which train is best, such as rouge_l or eval_loss. Empty: F1 of the evaluation "
        "rows, or what the method measures on them; without them the validation loss.",
    )
    at_once: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        title="At once",
        description="How many trains run at the same time. Empty: as many as the host has GPUs for, else one.",
    )
    queue: QueueName = Field(
        default="default", title="Queue", description="Who gets a GPU first where several trains wait."
    )


class AddMethod(BaseModel):
    """What the flow `add-method` needs."""

    folder: Text = Field(
        title="Folder",
        description="Folder of the method on the host that the worker runs on, with its method.yaml; its absolute "
        "path. Its files will be run by that worker.",
    )


class NewMethod(BaseModel):
    """What the flow `new-method` needs."""

    name: Slug = Field(title="Name", description="Name of the new method: small letters, digits and -.")
    folder: Text = Field(
        title="Folder",
        description="Folder to write on the host that the worker runs on, which is not there yet; its absolute path.",
    )
    template: Slug = Field(default="custom01", title="From", description="Method to begin with.")


class CheckMethod(BaseModel):
    """What the flow `check-method` needs."""

    name: Slug = Field(title="Name", description="Name of a method.")


class DeleteMethod(BaseModel):
    """What the flow `delete-method` needs."""

    name: Slug = Field(title="Name", description="Name of a method that was added.")


class AddBaseModel(BaseModel):
    """What the flow `add-base-model` needs."""

    name: Slug = Field(title="Name", description="Name to choose the model by.")
    path: Text | None = Field(
        default=None,
        title="Folder",
        description="Folder with config.json and safetensors on the host that the worker runs on. This, or a hub id.",
    )
    hub: Text | None = Field(default=None, title="Hub id", description="OWNER/NAME on the hub. This, or a folder.")
    type: ModelType = Field(default="chat", title="Type", description="What it is.")
    revision: Text | None = Field(default=None, title="Revision", description="Revision on the hub.")
    title: Text | None = Field(default=None, title="Title", description="Title. Empty: the name.")
    description: str = Field(default="", max_length=500, title="Description", description="What it is good for.")
    license: str = Field(default="", max_length=100, title="License", description="License of the weights.")


def train_form(method: Method, through: Through, base_models: Sequence[str], profiles: Sequence[str] = ()) -> Schema:
    """The form of a train of this method that goes as far as `through`.

    `base_models` are the registered ones, told as examples: a folder or a hub id is fine as well; `profiles` are the
    names of the saved ones.
    """
    spread = method.hardware.distributions
    train = _object(TrainConfig, _COMMON_TRAIN, without=(*_NOT_ASKED, *(() if spread else _OF_SPREADING)))
    fields = train["properties"]
    if spread:
        fields["distribution"]["enum"] = ["none", *spread]
    fields["base_model"]["examples"] = list(base_models)
    fields["base_model"]["description"] += f" Registered: {', '.join(base_models)}."
    fields["dataset"]["description"] += " A file: its absolute path on the host that the worker runs on."
    for name, default in method.train.items():
        if name in fields and default is not None:
            fields[name]["default"] = default
    fields["hyperparameters"] = _hyperparameter_form(method, through) | {"title": "Hyper-parameters"}
    fields[OWN] = _method_form(method)
    if not method.parameters:
        del fields[OWN]
    if any(schema.get("required") for schema in method.parameters.values()):
        train["required"].append(OWN)
    # Required, so that a run started through the API cannot train with another method than its deployment's.
    fields["method"] = {
        "type": "string",
        "enum": [method.name],
        "default": method.name,
        "title": "Training method",
        "description": method.description,
    }
    train["required"].append("method")
    _number(fields)
    properties = {"train": train | {"title": "Train"}, **_object(WithProfile)["properties"]}
    if profiles:
        properties["profile"]["examples"] = list(profiles)
        properties["profile"]["description"] += f" Saved: {', '.join(profiles)}."
    if through == "deployed":
        served = _object(ServedAt)["properties"]
        served["target"] |= {"enum": list(method.deployment_targets), "default": method.deployment_targets[0]}
        properties |= served
    _number(properties)
    return {"type": "object", "properties": properties, "required": ["train"], "additionalProperties": False}


def plain_form(model: type[BaseModel], first: Sequence[str] = ()) -> Schema:
    """The form of a flow whose parameters are the fields of `model`; those named `first` stand on top."""
    return _object(model, first)


def resolve_form(
    train: TrainConfig,
    through: Through,
    endpoint: str | None = None,
    profile: str | RecordedProfile | None = None,
) -> ResolvedTrain:
    """The configuration a form gave, with the path of its flow, the origin of every value and the warnings.

    A form sends its defaults too, so what differs from the defaults of the method is what somebody has set.
    Raises UserError for values that the method cannot take, or that contradict each other on this path.
    """
    if train.through not in (None, through):
        raise UserError(
            "this flow does not go as far as the train is to go, or further",
            field="through",
            value=train.through,
            expected=through,
            mend=f"leave it out, or run the flow {train.through}",
        )
    given = _set_by_somebody(train) | {"through": through}
    if endpoint is not None:
        given["endpoint"] = endpoint
    found = resolve_train(copied=given, copied_from=FORM, profile=profile)
    origins = {name: FORM if origin == f"copied from {FORM}" else origin for name, origin in found.origins.items()}
    warnings = [warning.replace(f"copied from {FORM}", f"the {FORM}") for warning in found.warnings]
    warnings = [warning.replace("copied values", f"what is set in the {FORM}") for warning in warnings]
    return found.model_copy(update={"origins": origins, "warnings": warnings})


def _set_by_somebody(train: TrainConfig) -> dict[str, Any]:
    """What the form gave that is not the default of its method."""
    method = find_method(train.method)
    given = train.model_dump(mode="json", exclude_defaults=True, exclude={"hyperparameters", OWN})
    for name, default in method.train.items():  # in the place of the common default
        value = getattr(train, name)
        if name in train.model_fields_set and value != default:
            given[name] = value
        else:
            given.pop(name, None)
    hyper = train.hyperparameters.model_dump(mode="json", exclude_unset=True)
    defaults = method.parameter_defaults
    given["hyperparameters"] = {
        name: value for name, value in hyper.items() if value != method.hyperparameter_default(name)
    }
    given[OWN] = {
        name: value
        for name, value in train.method_params.items()
        if name not in method.parameters or value != defaults.get(name)
    }
    return given


def mark_copied(resolved: ResolvedTrain, train_id: str, copied: TrainConfig) -> ResolvedTrain:
    """The same, with `copied from TRAIN` as the origin of every value of the form that this train had as well."""
    before = copied.model_dump(mode="json")
    now = resolved.config.model_dump(mode="json")
    origins = {
        name: f"copied from {train_id}" if origin == FORM and _value(now, name) == _value(before, name) else origin
        for name, origin in resolved.origins.items()
    }
    return resolved.model_copy(update={"origins": origins})


def _value(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name; None where there is none."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


# --- schemas -----------------------------------------------------------------------------------------------


def _hyperparameter_form(method: Method, through: Through) -> Schema:
    """The hyper-parameters that the method uses, with its own defaults and choices."""
    common = method.hyperparameters
    form = _object(Hyperparameters, _COMMON_HYPER, without=common.unused)
    fields = form["properties"]
    for name in fields:
        if name in common.choices:
            fields[name]["enum"] = [choice for choice in common.choices[name] if choice is not None]
        default = method.hyperparameter_default(name)
        if default is not None:
            fields[name]["default"] = default
    if through == "customized" and "tuning" in fields:
        # Full tuning leaves self-contained weights: there is no customized model to end with.
        fields["tuning"]["enum"] = [value for value in fields["tuning"]["enum"] if value != "full"]
        fields["tuning"]["default"] = fields["tuning"]["enum"][0]
    return form


def _method_form(method: Method) -> Schema:
    fields = {name: _own_field(method, name, schema) for name, schema in method.parameters.items()}
    _number(fields)
    return {
        "type": "object",
        "title": "Method parameters",
        "description": f"Parameters that only {method.name} has.",
        "properties": fields,
        "required": [name for name, schema in method.parameters.items() if schema.get("required")],
        "additionalProperties": False,
    }


_TAKES = {
    MODEL: "A model of a completed train: its name, LINE@ALIAS, or the train.",
    PATH: "Its absolute path on the host that the worker runs on.",
}


def _own_field(method: Method, name: str, schema: Mapping[str, Any]) -> Schema:
    """One parameter of the method's own; a file that comes with the method is named as the worker finds it."""
    field = {"title": name.replace("_", " ").capitalize(), **json_schema(schema)}
    described = [str(schema.get("description", "")), _TAKES.get(str(schema.get("format")), "")]
    field["description"] = " ".join(filter(None, described))
    if "default" in field and method.takes_file(name):
        del field["default"]  # the path of a host; left empty it is the one that comes with the method
        field["description"] += f" Empty: {schema['default']} of the method."
    return field


def _object(model: type[BaseModel], first: Sequence[str] = (), without: Sequence[str] = ()) -> Schema:
    schema = model.model_json_schema()
    names = _ordered(schema["properties"], first, without)
    fields = {name: _field(name, schema["properties"][name], schema.get("$defs", {})) for name in names}
    _number(fields)
    return {
        "type": "object",
        "properties": fields,
        "required": [name for name in schema.get("required", []) if name in fields],
        "additionalProperties": False,
    }


def _ordered(properties: Iterable[str], first: Sequence[str], without: Sequence[str]) -> list[str]:
    names = [*first, *(name for name in properties if name not in first)]
    return [name for name in names if name not in without]


def _number(fields: Mapping[str, Schema]) -> None:
    for position, field in enumerate(fields.values()):
        field["position"] = position


def _field(name: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """One field as the page draws it: a single type, its limits, and the typical range in its description."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    # Where text is one of several kinds (`q_proj,v_proj` or a list), text says all of it.
    chosen = next((option for option in options if option.get("type") == "string"), options[0])
    if "$ref" in chosen:
        chosen = definitions[chosen["$ref"].rpartition("/")[2]]
    field = {key: value for key, value in {**schema, **chosen}.items() if key in _KEPT}
    if field.get("default", "") is None:
        del field["default"]
    if "const" in field:
        field["enum"] = [field.pop("const")]
    if "$ref" in field.get("items", {}):
        field["items"] = _item(definitions[field["items"]["$ref"].rpartition("/")[2]], definitions)
    described = [str(schema.get("description", ""))]
    typical = typical_of(dict(schema))
    if typical is not None:
        described.append(f"Typical: {typical_text(typical)}.")
    return field | {"title": schema.get("title", name), "description": " ".join(filter(None, described))}


def _item(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """One entry of a list of objects, written out in place."""
    fields = {name: _field(name, field, definitions) for name, field in schema["properties"].items()}
    _number(fields)
    return {
        "type": "object",
        "title": schema["title"],
        "properties": fields,
        "required": list(schema.get("required", [])),
        "additionalProperties": False,
    }

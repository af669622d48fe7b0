"""Words about the fields of the configuration, made from the models: limits, typical ranges, the table."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from pydantic import BaseModel

from configs.aliases import SPELLINGS
from configs.train import Hyperparameters, TrainConfig, Typical

_DEFAULTS_IN_WORDS = ("required", "see below", "none", "not set", "empty")


def fields_of(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The JSON schema of every field of the model, by name."""
    return cast(dict[str, dict[str, Any]], model.model_json_schema()["properties"])


def limits_of(schema: dict[str, Any]) -> str:
    """What a field accepts, in words: `a whole number ≥ 1, or not set`."""
    if "limits" in schema:
        return str(schema["limits"])
    if "anyOf" in schema:
        kinds = [limits_of(option) for option in schema["anyOf"]]
        return ", or ".join(kinds)
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    kind = schema.get("type")
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "not set",
        "array": "a list",
        "object": "`name: value` pairs",
        "string": "text",
    }.get(str(kind), "`name: value` pairs")
    return words + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    parts = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    if "maxLength" in schema:
        parts.append(f"of at most {schema['maxLength']} characters")
    return " " + " and ".join(parts) if parts else ""


def typical_of(schema: dict[str, Any]) -> Typical | None:
    """The documented typical range of a field, or None."""
    return cast("Typical | None", schema.get("typical"))


def typical_text(typical: Typical) -> str:
    """A typical range in words, without its source: `1 to 64`, `8, 16, 32`."""
    if "values" in typical:
        text = ", ".join(f"{value:g}" for value in typical["values"])
    else:
        text = f"{typical['low']:g} to {typical['high']:g}"
    if "multiple_of" in typical:
        text += f", a multiple of {typical['multiple_of']}"
    also = ", ".join(f"{value:g}" for value in typical.get("also", []))
    return f"{also} or {text}" if also else text


def is_typical(value: float, typical: Typical) -> bool:
    """Whether a value lies in the documented range."""
    if value in typical.get("also", []):
        return True
    if "values" in typical:
        return value in typical["values"]
    step = typical.get("multiple_of")
    return typical["low"] <= value <= typical["high"] and (step is None or value % step == 0)


class Parameter(NamedTuple):
    """One parameter in words; `typical` is empty if nothing is documented."""

    name: str
    spellings: tuple[str, ...]
    default: str
    limits: str
    typical: str
    meaning: str


def parameters() -> dict[str, list[Parameter]]:
    """All parameters by heading: first the train's own, then the hyper-parameters."""
    models: dict[str, type[BaseModel]] = {"Train": TrainConfig, "Hyper-parameters": Hyperparameters}
    return {
        heading: [_parameter(name, schema, model) for name, schema in fields_of(model).items()]
        for heading, model in models.items()
    }


def parameter_table() -> str:
    """The reference table of all parameters in Markdown."""
    parts = []
    for heading, found in parameters().items():
        lines = [
            f"### {heading}",
            "",
            "| Name | Also written | Default | Limits | Typical | Meaning |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_row(parameter) for parameter in found),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _parameter(name: str, schema: dict[str, Any], model: type[BaseModel]) -> Parameter:
    typical = typical_of(schema)
    return Parameter(
        name=name,
        spellings=SPELLINGS.get(name, ()),
        default=_default_text(name, model),
        limits=limits_of(schema),
        typical=f"{typical_text(typical)} ({typical['source']})" if typical else "",
        meaning=str(schema.get("description", "")),
    )


def _row(parameter: Parameter) -> str:
    spellings = ", ".join(f"`{spelling}`" for spelling in parameter.spellings)
    default = parameter.default
    cells = (
        f"`{parameter.name}`",
        spellings or "–",
        default if default in _DEFAULTS_IN_WORDS else f"`{default}`",
        parameter.limits,
        parameter.typical or "–",
        parameter.meaning,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default_text(name: str, model: type[BaseModel]) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "see below" if name == "hyperparameters" else "none"
    if field.default is None:
        return "not set"
    if field.default == "":
        return "empty"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)

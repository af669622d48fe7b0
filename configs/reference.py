"""Words about the fields of the configuration, made from the models: limits, typical ranges, the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import BaseModel

from configs.aliases import SPELLINGS
from configs.train import Hyperparameters, TrainConfig, Typical

if TYPE_CHECKING:
    from methods.manifest import Method

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


def parameters(method: Method | None = None) -> dict[str, list[Parameter]]:
    """All parameters by heading: first the train's own, then the hyper-parameters.

    With a method the hyper-parameters are those that it uses, with its defaults and choices, and its own follow.
    """
    models: dict[str, type[BaseModel]] = {"Train": TrainConfig, "Hyper-parameters": Hyperparameters}
    found = {
        heading: [_parameter(name, schema, model) for name, schema in fields_of(model).items()]
        for heading, model in models.items()
    }
    if method is not None:
        found["Train"] = [_as_ready(each, method) for each in found["Train"]]
        used = [each for each in found["Hyper-parameters"] if each.name in method.hyperparameter_names]
        found["Hyper-parameters"] = [_as_taken(each, method) for each in used]
        if method.parameters:
            own = [_own_parameter(name, schema) for name, schema in method.parameters.items()]
            found[f"Parameters of {method.name}"] = own
    return found


def _as_ready(parameter: Parameter, method: Method) -> Parameter:
    """A field of the train with what it is where nobody says otherwise."""
    if parameter.name not in method.train:
        return parameter
    return parameter._replace(default=_value_text(method.train[parameter.name]))


def _as_taken(parameter: Parameter, method: Method) -> Parameter:
    """A common hyper-parameter with the method's own default and choices."""
    from configs.parameter_schemas import choices_text

    name = parameter.name
    if name in method.hyperparameter_defaults:
        parameter = parameter._replace(default=_value_text(method.hyperparameter_default(name)))
    if name in method.hyperparameters.choices:
        parameter = parameter._replace(limits=f"one of {choices_text(method.hyperparameters.choices[name])}")
    return parameter


def _own_parameter(name: str, schema: dict[str, Any]) -> Parameter:
    from configs.parameter_schemas import limits

    return Parameter(
        name=name,
        spellings=(),
        default="required" if schema.get("required") else _value_text(schema["default"]),
        limits=limits(schema),
        typical="",
        meaning=str(schema.get("description", "")),
    )


def parameter_table(method: Method | None = None) -> str:
    """The reference table of all parameters in Markdown."""
    parts = []
    for heading, found in parameters(method).items():
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
    return _value_text(field.default)


def _value_text(value: object) -> str:
    if value is None:
        return "not set"
    if value == "":
        return "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""The parameters that only one training method has: their schemas in its manifest, and values checked against them.

A schema is JSON schema (2020-12) of one type, so that the Prefect page draws it as one field and its server checks
values by the same rules, with three additions: `required: true` instead of a default, and the formats `model` (a
registered model, by name, LINE@ALIAS or train) and `path` (a file). `default: null` says that it may be left unset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from configs.reference import limits_of

MODEL = "model"
PATH = "path"
NAME = r"[a-z][a-z0-9_]{0,59}"

Schema = Mapping[str, Any]

_TYPES = ("string", "integer", "number", "boolean", "array", "object")
_KEYS = (
    "type",
    "title",
    "description",
    "default",
    "required",
    "format",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "items",
    "minItems",
    "maxItems",
    "uniqueItems",
    "examples",
)
_WORDS = {
    MODEL: "a registered model of a completed train: its name, LINE@ALIAS, or the train",
    PATH: "a file that exists on the host",
}


class Fault(NamedTuple):
    """What is wrong with a schema: `key` is the keyword at fault, None for the schema as a whole."""

    key: str | None
    problem: str
    value: object
    expected: str


def choices_text(choices: Iterable[Any]) -> str:
    """The values that a method takes of a hyper-parameter, in words."""
    return ", ".join("not set" if choice is None else str(choice) for choice in choices)


def schema_fault(name: str, schema: object) -> Fault | None:
    """The first thing that is wrong with the schema of the parameter `name`; None if it is right."""
    if not re.fullmatch(NAME, name):
        return Fault(None, "not usable as the name of a parameter", name, "small letters, digits and _ (at most 60)")
    if not isinstance(schema, Mapping):
        return Fault(None, "a parameter is a schema", schema, "such as {type: number, minimum: 0, default: 0.1}")
    unknown = next((key for key in schema if key not in _KEYS), None)
    if unknown is not None:
        return Fault(unknown, "there is no such keyword", schema[unknown], f"one of {', '.join(_KEYS)}")
    if schema.get("type") not in _TYPES:
        return Fault("type", "a parameter has one type", schema.get("type"), f"one of {', '.join(_TYPES)}")
    for key in ("title", "description"):
        if not isinstance(schema.get(key, ""), str):
            return Fault(key, "this is text", schema[key], "text")
    if not isinstance(schema.get("required", False), bool):
        return Fault("required", "this is a switch", schema["required"], "true, or a default instead")
    if "format" in schema and (schema["format"] not in _WORDS or schema["type"] != "string"):
        return Fault("format", "there is no such format", schema["format"], "model or path, of the type string")
    return _json_fault(schema) or _default_fault(schema)


def _json_fault(schema: Schema) -> Fault | None:
    try:
        Draft202012Validator.check_schema(json_schema(schema))
    except SchemaError as error:
        key = str(error.path[0]) if error.path else None
        return Fault(key, f"this is no JSON schema: {error.message}", error.instance, "JSON schema (2020-12)")
    return None


def _default_fault(schema: Schema) -> Fault | None:
    if schema.get("required"):
        if "default" in schema:
            return Fault("default", "what is required has no default", schema["default"], "one of the two")
        return None
    if "default" not in schema:
        expected = "a default, `default: null` (may be left unset), or `required: true`"
        return Fault(None, "this parameter has no default", None, expected)
    if schema["default"] is not None and not fits(schema, schema["default"]):
        return Fault("default", "the default is no value that the schema allows", schema["default"], limits(schema))
    if schema["default"] is not None and schema.get("format") == MODEL:
        return Fault("default", "no model is there on every installation", schema["default"], "default: null")
    return None


def json_schema(schema: Schema) -> dict[str, Any]:
    """The schema as JSON schema alone, as the form holds it: without what it says beyond that."""
    plain = {key: value for key, value in schema.items() if key not in ("required", "format")}
    if plain.get("default", "") is None:
        del plain["default"]
    return plain


def fits(schema: Schema, value: object) -> bool:
    """Whether the schema allows the value."""
    if value is None:
        return "default" in schema and schema["default"] is None
    if isinstance(value, float) and not math.isfinite(value):
        return False  # JSON has no word for it
    return bool(Draft202012Validator(json_schema(schema)).is_valid(value))


def plain_value(schema: Schema, value: Any) -> Any:
    """A value that fits, as the number type that the schema names: 1 and 1.0 are recorded as one."""
    if value is None or isinstance(value, bool):
        return value
    if schema["type"] == "number":
        return float(value)
    return int(value) if schema["type"] == "integer" else value


def limits(schema: Schema) -> str:
    """What a parameter accepts, in words."""
    text = _WORDS.get(schema.get("format", "")) or limits_of(dict(schema))
    return f"{text}, or not set" if schema.get("default", "") is None else text

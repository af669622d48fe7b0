"""Scores the tool calls of an answer against its reference: valid, of the right tool, with the right arguments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from methods.toolkit.tool_parsing import Parsed
from tasks.text_checks import equal_json

Calls = Sequence[Mapping[str, Any]]
"""Calls as `name` and `arguments`."""


def tool_figures(answer: Parsed, wanted: Calls, tools: Sequence[Mapping[str, Any]]) -> dict[str, float | bool | None]:
    """The figures of `configs.scoring.ToolChecks`, in percent, and whether the answer calls a tool.

    All are None for a row that has no tools and wants no call.
    """
    figures: dict[str, float | bool | None] = dict.fromkeys(
        ("tool_call_valid", "tool_name_accuracy", "tool_arguments_accuracy", "tool_false_call", "calls_tool")
    )
    if not wanted and not tools:
        return figures
    figures["calls_tool"] = answer.made
    if not wanted:
        return figures | {"tool_false_call": 100.0 * answer.made}
    readable = bool(answer.calls) and not answer.broken
    return figures | {
        "tool_call_valid": 100.0 * (readable and all(is_valid(call, tools) for call in answer.calls)),
        "tool_name_accuracy": 100.0 * (readable and _names(answer.calls) == _names(wanted)),
        "tool_arguments_accuracy": 100.0 * (readable and _same_calls(answer.calls, wanted)),
    }


def is_valid(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tool is among the row's, and its schema allows the arguments.

    A row with calls but no tools says nothing about them: any call is valid then. So are any arguments where the
    tool's own schema is no JSON schema.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if not schemas:
        return True
    if call["name"] not in schemas:
        return False
    return _fits(call["arguments"], json.dumps(schemas[call["name"]], sort_keys=True))


def _fits(arguments: Any, schema: str) -> bool:
    validator = _validator(schema)
    if validator is None:
        return True
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(arguments))
    except Unresolvable:  # a schema that refers to another document, which is never fetched
        return True


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any | None:
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry

    read = json.loads(schema)
    try:
        Draft202012Validator.check_schema(read)
    except SchemaError:
        return None
    return Draft202012Validator(read, registry=Registry())


def _names(calls: Calls) -> Counter[str]:
    return Counter(call["name"] for call in calls)


def _same_calls(given: Calls, wanted: Calls) -> bool:
    left = list(given)
    for call in wanted:
        same = next((each for each in left if each["name"] == call["name"] and _same_arguments(each, call)), None)
        if same is None:
            return False
        left.remove(same)
    return not left


def _same_arguments(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return equal_json(one["arguments"], other["arguments"])

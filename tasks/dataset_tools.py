"""Tools in rows: descriptions, calls and results of every format, in the form of OpenAI's interface."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.dataset_fields import RowRefusedError, Turn, nearest, wrong_type
from tasks.dataset_reading import describe, excerpt, parse_cell

TOOL_COLUMNS = ("tools", "functions")
CALL_ROLES = ("tool_call", "function_call")
RESULT_ROLES = ("tool", "function", "observation", "tool_response", "function_response")
_CALL_TAG = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_RESULT_TAG = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_TOOLS_TAG = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    "none": "null",
}
_JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
_VALUES_OF_SCHEMAS = ("default", "const", "enum", "examples")

Tool = dict[str, Any]


# What a row says about tools


def has_tools(row: Mapping[str, object], *columns: str) -> bool:
    """Whether a row describes tools, or one of its columns holds messages that call one or hold a result."""
    return describes_tools(row) or any(_holds_calls(parse_cell(row.get(column))) for column in columns)


def describes_tools(row: Mapping[str, object]) -> bool:
    """Whether a column of a row holds descriptions of tools; a text or list of another meaning is none."""
    for column in TOOL_COLUMNS:
        found = parse_cell(row.get(column))
        items = [parse_cell(item) for item in (found if isinstance(found, list) else [found])]
        if any(isinstance(item, dict) and ("function" in item or "name" in item) for item in items):
            return True
    return False


def _holds_calls(turns: object) -> bool:
    listed = turns if isinstance(turns, list) else [turns]
    return any(isinstance(turn, dict) and _is_tool_turn(turn) for turn in listed)


def _is_tool_turn(turn: Mapping[str, object]) -> bool:
    role = turn.get("role", turn.get("from"))
    if turn.get("tool_calls") or turn.get("function_call") or role in (*CALL_ROLES, *RESULT_ROLES):
        return True
    said = turn.get("content", turn.get("value"))
    return role in ("assistant", "gpt") and isinstance(said, str) and "<tool_call>" in said


# Descriptions of tools


def tools_of(row: Mapping[str, object]) -> list[Tool]:
    """The tools that a row describes, as OpenAI's interface has them. Raises RowRefusedError."""
    found: list[Tool] = []
    for column in TOOL_COLUMNS:
        found += read_tools(row.get(column), column)
    return found


def read_tools(value: object, field: str) -> list[Tool]:
    """Descriptions of tools: a list, or one, of function schemas, wrapped or bare, each of which may be JSON text.

    Parameters become a JSON schema: those of xLAM (`{name: {type, description}}`) and the type names of Python are
    translated. Raises RowRefusedError.
    """
    value = parse_cell(value)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = parsed_json(value, field, "a list of tools")
    items = value if isinstance(value, list) else [value]
    return [_tool(parse_cell(item), f"{field}[{index}]") for index, item in enumerate(items)]


def _tool(tool: object, field: str) -> Tool:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise wrong_type(field, tool, "an object with a name")
    beside = {name: value for name, value in tool.items() if name != "type" and value is not None}
    function = {name: value for name, value in inner.items() if value is not None and name != "type"}
    parameters = parse_cell(function.get("parameters", {}))
    function["parameters"] = _schema(parameters, f"{field}.parameters")
    return {"type": "function", **(beside if inner is not tool else {}), "function": function}


def _schema(given: object, field: str) -> dict[str, Any]:
    """Parameters as a JSON schema of an object."""
    if not isinstance(given, dict):
        raise wrong_type(field, given, "a JSON schema of the parameters")
    parameters: dict[str, Any] = _without_nulls(given)
    properties = parameters.get("properties")
    named = isinstance(properties, dict) and all(isinstance(each, dict) for each in properties.values())
    if isinstance(parameters.get("type"), str) or named:
        return {"type": "object", "properties": {}, **_json_types(parameters)}
    return _xlam_schema(parameters, field)


def _xlam_schema(parameters: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The parameters of xLAM: a type of Python, a description and a default for each name."""
    properties: dict[str, Any] = {}
    required = []
    for name, given in parameters.items():
        if not isinstance(given, dict):
            raise wrong_type(f"{field}.{name}", given, "an object with the type of the parameter")
        kind, *notes = _top_level_parts(str(given.get("type", "any")))
        noted = any("optional" in note for note in notes) or kind.lower().startswith("optional[")
        optional = noted or "default" in given
        properties[name] = {**_python_type(kind), **{key: each for key, each in given.items() if key != "type"}}
        required += [] if optional else [name]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _python_type(text: str) -> dict[str, Any]:
    """A type of Python's annotations as a JSON schema; a type that JSON lacks allows any value."""
    text = text.strip()
    found = re.fullmatch(r"(\w+)\[(.*)\]", text)
    if found is None:
        kind = _PYTHON_TYPES.get(text.lower(), text.lower())
        return {"type": kind} if kind in _JSON_TYPES else {}
    outer, inner = found[1].lower(), _top_level_parts(found[2])
    if outer == "optional":
        return _python_type(found[2])
    if outer == "union":
        return {"anyOf": [_python_type(part) for part in inner]}
    kind = _PYTHON_TYPES.get(outer, outer)
    if kind == "array" and outer != "tuple" and (items := _python_type(inner[0])):
        return {"type": "array", "items": items}
    return {"type": kind} if kind in _JSON_TYPES else {}


def _top_level_parts(text: str) -> list[str]:
    """`int, List[str, int]` cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _json_types(schema: Any) -> Any:
    """A schema whose types are those of JSON; some files write `dict` or `float`."""
    if isinstance(schema, list):
        return [_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value if key in _VALUES_OF_SCHEMAS else _json_types(value) for key, value in schema.items()}
    if isinstance(kept.get("type"), str):
        kept["type"] = _PYTHON_TYPES.get(kept["type"].lower(), kept["type"])
    return kept


def _without_nulls(value: Any) -> Any:
    """A schema without the nulls that tables fill up nested columns with, and without what holds nothing else."""
    if not isinstance(value, dict):
        return [_without_nulls(item) for item in value] if isinstance(value, list) else value
    kept = {}
    for key, given in value.items():
        left = given if key in _VALUES_OF_SCHEMAS else _without_nulls(given)
        if left is not None and (left != {} or given == {}):
            kept[key] = left
    return kept


def tools_in_system(text: str) -> tuple[str, list[Tool]]:
    """The system message of Hermes without the list of tools in it, and that list.

    The template writes the tools itself: left there, the model would read them twice.
    """
    found = _TOOLS_TAG.search(text)
    if found is None:
        return text, []
    try:
        listed = json.loads(found[1])
    except ValueError:
        try:
            listed = [json.loads(line) for line in found[1].splitlines() if line.strip()]
        except ValueError:
            return text, []
    if not listed or not all(isinstance(item, dict) for item in (listed if isinstance(listed, list) else [listed])):
        return text, []
    rest = text[: found.start()].rstrip() + "\n" + text[found.end() :].lstrip()
    return rest.strip(), read_tools(listed, "tools")


# Calls and results


def calls_of(value: object, field: str, tools: Sequence[Tool], dropped: list[str]) -> list[dict[str, Any]]:
    """Calls as OpenAI's interface has them, with their arguments as objects. Raises RowRefusedError.

    Arguments that a table has filled up with null are left out and added to `dropped`: a null is kept where it is
    written in JSON text, or where the schema of the tool requires the argument and allows null.
    """
    is_text = isinstance(value, str)
    if isinstance(value, str):
        value = parsed_json(value, field, '{"name": "…", "arguments": {…}}')
    calls = value if isinstance(value, list) else [value]
    fields = [f"{field}[{index}]" if len(calls) > 1 else field for index in range(len(calls))]
    return [_call(call, each, tools, dropped, is_text) for call, each in zip(calls, fields, strict=True)]


def _call(call: object, field: str, tools: Sequence[Tool], dropped: list[str], is_text: bool) -> dict[str, Any]:
    call = parse_cell(call)
    function = parse_cell(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong_type(field, call, "a call with a name and its arguments")
    name = function["name"]
    given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    if isinstance(given, str):
        is_text, given = True, parsed_json(given, f"{field}.arguments", "an object of arguments, or one as JSON text")
    if not isinstance(given, dict):
        raise wrong_type(f"{field}.arguments", given, "an object of arguments, or one as JSON text")
    schema = _schema_of(name, field, tools)
    arguments = given if is_text else _without_padding(given, schema, f"tool_calls.{name}", dropped)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


def _schema_of(name: str, field: str, tools: Sequence[Tool]) -> Mapping[str, Any]:
    """The schema of the tool's parameters; an empty one for a row that describes no tools."""
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if known and name not in known:
        raise RowRefusedError(
            "unknown_tool",
            f"{field} calls {excerpt(name)}, which is not among the row's tools{nearest(name, list(known))}",
            field=f"{field}.name",
            found=excerpt(name),
            expected=f"one of {', '.join(known)}",
            mend="describe the tool in the column tools, or remove the row",
        )
    schema: Mapping[str, Any] = known.get(name, {})
    return schema


def _without_padding(
    value: dict[str, Any], schema: Mapping[str, Any], place: str, dropped: list[str]
) -> dict[str, Any]:
    kept = {}
    properties = schema.get("properties") or {}
    for key, given in value.items():
        of_key = properties.get(key)
        inner = of_key if isinstance(of_key, dict) else {}
        left = _left_of(given, inner, f"{place}.{key}", dropped)
        if left is None and (key not in schema.get("required", []) or not _allows_null(inner)):
            name = f"{place}.{key} (null)"
            dropped += [] if name in dropped else [name]
        elif left != {} or given == {}:
            kept[key] = left
    return kept


def _left_of(given: Any, schema: Mapping[str, Any], place: str, dropped: list[str]) -> Any:
    if isinstance(given, dict):
        return _without_padding(given, schema, place, dropped)
    if isinstance(given, list):
        items = schema.get("items")
        inner = items if isinstance(items, dict) else {}
        return [_left_of(each, inner, f"{place}[]", dropped) if isinstance(each, dict) else each for each in given]
    return given


def _allows_null(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type")
    several = [each for name in ("anyOf", "oneOf") for each in schema.get(name) or []]
    return (
        kinds == "null"
        or (isinstance(kinds, list) and "null" in kinds)
        or schema.get("nullable") is True
        or None in (schema.get("enum") or [])
        or any(isinstance(each, dict) and _allows_null(each) for each in several)
    )


def parsed_json(text: str, field: str, expected: str) -> Any:
    """The value of a JSON text. Raises RowRefusedError with the place where it breaks."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRefusedError(
            "broken_json",
            f"{field} is no JSON: {error}",
            field=field,
            found=excerpt(text),
            expected=expected,
            mend="correct the JSON, or remove the row",
        ) from None


def split_calls(text: str, field: str, tools: Sequence[Tool], dropped: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer without the calls in its `<tool_call>` tags, and those calls. Raises RowRefusedError."""
    found = _CALL_TAG.findall(text)
    if not found:
        return text, []
    calls = [call for each in found for call in calls_of(each.strip(), field, tools, dropped)]
    return _CALL_TAG.sub("", text).strip(), calls


def results_in(text: str) -> list[str]:
    """The results in the `<tool_response>` tags of a message that holds nothing else; else the whole message."""
    found = _RESULT_TAG.findall(text)
    return [each.strip() for each in found] if found and not _RESULT_TAG.sub("", text).strip() else [text]


def is_results(text: str) -> bool:
    """Whether a message holds results in `<tool_response>` tags and nothing else."""
    return bool(_RESULT_TAG.search(text)) and not _RESULT_TAG.sub("", text).strip()


def result_text(value: object, field: str) -> str:
    """The result of a tool as text; an object or a list becomes JSON. Raises RowRefusedError."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) and "text" in part for part in value):
        return "".join(str(part["text"]) for part in value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    raise wrong_type(field, value, "text")


def linked(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with an id for each call, and with the id and name of its call for each result.

    Missing ids are `call00001` and so on: nine letters and digits, the only ones that Mistral's templates take. A
    result without an id belongs to the first call before it that has none, by name where it has one.
    """
    told: list[Turn] = []
    waiting: list[tuple[str, str]] = []
    number = 0
    for turn in turns:
        more = dict(turn.more)
        if "tool_calls" in more:
            calls = []
            for call in more["tool_calls"]:
                number += 1
                calls.append({"id": f"call{number:05d}", **call})
            more["tool_calls"] = calls
            waiting += [(call["id"], call["function"]["name"]) for call in calls]
        elif turn.role == "tool":
            more = {**_call_of_result(more, waiting), **more}
        told.append(turn._replace(more=more))
    return told


def _call_of_result(more: Mapping[str, Any], waiting: list[tuple[str, str]]) -> dict[str, str]:
    """The id and name of the call that a result answers, which waits no longer; empty if no call is known."""
    wanted = [("tool_call_id", 0), ("name", 1)]
    found = next(
        (call for key, place in wanted for call in waiting if key in more and call[place] == more[key]),
        None if more else next(iter(waiting), None),
    )
    if found is None:
        return {}
    waiting.remove(found)
    return {"tool_call_id": found[0], "name": found[1]}


def joined(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the calls of one answer in one message: some files write a message a call, after its text."""
    told: list[Turn] = []
    for turn in turns:
        calls = turn.more.get("tool_calls")
        apart = turn.content or turn.thought or not told or told[-1].role != "assistant"
        if calls and not apart and told[-1].trained == turn.trained:
            before = told[-1]
            told[-1] = before._replace(more={**before.more, "tool_calls": [*before.more.get("tool_calls", []), *calls]})
        else:
            told.append(turn)
    return told


def said_in(turn: Turn) -> str:
    """What a turn says: its text, or its calls in words for a message."""
    return turn.content or describe(turn.more.get("tool_calls"))

"""The tool calls in an answer of a model, in the formats that chat templates teach. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_HARMONY = re.compile(r"to=functions\.([\w.-]+).*?<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|\Z)", re.DOTALL)
_HARMONY_PART = re.compile(r".*\Z", re.DOTALL)  # before a call stands a thought, which is no answer
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)", re.DOTALL)
_MISTRAL_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\](.*)\Z", re.DOTALL)
_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(\S+)\s*```json\s*(.*?)(?:```|\Z)", re.DOTALL)
_DEEPSEEK_PART = re.compile(r"<｜tool▁calls▁begin｜>.*\Z", re.DOTALL)
_MARKED = re.compile(r"(?:<\|tool_call\|>|<\|python_tag\|>|<functioncall>)(.*?)(?:<\|/tool_call\|>|\Z)", re.DOTALL)
_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Parsed:
    """What an answer says beside its calls, its calls (`name` and `arguments`), and how many of them are unreadable."""

    content: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    broken: int = 0

    @property
    def made(self) -> bool:
        """Whether the answer calls a tool, readable or not."""
        return bool(self.calls or self.broken)


def parse_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> Parsed:
    """The calls of an answer, which is decoded with its special tokens where the calls are marked by some.

    `tools` say which arguments are texts, in the formats that write `3` and `"3"` alike.

    Read are JSON objects with `name` and `arguments` (or `parameters`) in `<tool_call>` tags, behind `[TOOL_CALLS]`,
    `<|python_tag|>`, `<|tool_call|>` or `<functioncall>`, or as the whole answer; GLM's `<arg_key>`, Qwen 3.5's
    `<function=NAME>`, DeepSeek's and gpt-oss's marks.
    """
    for pattern, part, read in _FORMATS:
        if pattern.search(text):
            found = [call for match in pattern.finditer(text) for call in read(match)]
            calls = [_typed(call, tools or ()) for call in found if call is not None]
            return Parsed(part.sub("", text).strip(), calls, len(found) - len(calls))
    return _bare(text.strip())


def _bare(text: str) -> Parsed:
    """An answer that is JSON, read as calls if all of it is; one that breaks off behind a name is a broken call."""
    begun = re.match(r"""\[?\s*\{\s*"(?:name|type)"\s*:""", text)
    found = _of_json(text) if begun and any(f'"{key}"' in text for key in _ARGUMENTS) else []
    calls = [call for call in found if call is not None]
    if len(calls) == len(found):
        return Parsed("" if calls else text, calls)
    return Parsed(text, [], 1)


class _Text(str):
    """A value that a format writes without quotes, whatever its type."""


def _typed(call: dict[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The call with the values that the format leaves without a type read as JSON, unless the tool wants texts."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    properties = schemas.get(call["name"], {}).get("properties") or {}
    wants_text = {name for name, each in properties.items() if isinstance(each, dict) and each.get("type") == "string"}
    arguments = {
        name: _value(value, as_text=name in wants_text) if isinstance(value, _Text) else value
        for name, value in call["arguments"].items()
    }
    return {**call, "arguments": arguments}


def calls_of_message(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name and arguments of each call of a message as OpenAI's interface has it. Broken arguments stay text."""
    found = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"].get("arguments") or {}
        read = _loaded(arguments) if isinstance(arguments, str) else arguments
        found.append({"name": call["function"]["name"], "arguments": arguments if read is None else read})
    return found


def as_text(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """An answer with calls as one text: what it says, then a line of JSON for each call, keys in order."""
    lines = [
        json.dumps({name: call[name] for name in ("name", "arguments")}, ensure_ascii=False, sort_keys=True)
        for call in calls
    ]
    return "\n".join([*([content.strip()] if content.strip() else []), *lines])


Call = dict[str, Any] | None


def _tagged(match: re.Match[str]) -> Iterator[Call]:
    body = match[1].strip()
    if "<function=" in body:
        for name, inner in _XML_FUNCTION.findall(body):
            yield {
                "name": name.strip(),
                "arguments": {key.strip(): _Text(value) for key, value in _XML_PARAMETER.findall(inner)},
            }
    elif "<arg_key>" in body or re.fullmatch(r"[\w.-]+", body):
        name = body.partition("<arg_key>")[0].strip()
        yield {"name": name, "arguments": {key.strip(): _Text(value) for key, value in _GLM_ARGUMENT.findall(body)}}
    else:
        yield from _of_json(body)


def _mistral(match: re.Match[str]) -> Iterator[Call]:
    named = _MISTRAL_NAMED.match(match[1].strip())
    if named is None:
        yield from _of_json(match[1].strip())
    else:
        yield _named(named[1], named[2])


def _named_match(match: re.Match[str]) -> Iterator[Call]:
    yield _named(match[1], match[2])


def _named(name: str, arguments: str) -> Call:
    read = _loaded(arguments.strip() or "{}")
    return {"name": name, "arguments": read} if isinstance(read, dict) else None


def _of_json(text: str) -> list[Call]:
    """The calls of JSON: an object, a list of them, or several with semicolons or new lines between them."""
    decoder = json.JSONDecoder()
    found: list[Call] = []
    place = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return [*found, None]
        found += [_call(item) for item in (value if isinstance(value, list) else [value])]
        while place < len(text) and (text[place].isspace() or text[place] in ";,"):
            place += 1
    return found or [None]


def _call(value: Any) -> Call:
    inner = value.get("function") if isinstance(value, dict) else None
    if isinstance(inner, dict):
        value = inner
    if not isinstance(value, dict):
        return None
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    arguments: Any = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if name is None or not isinstance(arguments, dict) or not any(key in value for key in (*_ARGUMENTS, "name")):
        return None
    return {"name": name, "arguments": arguments}


def _value(text: str, *, as_text: bool) -> Any:
    """A value that is written as JSON, or as bare text."""
    read = _loaded(text.strip())
    return str(text).strip("\n") if as_text or (read is None and text.strip() != "null") else read


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_FORMATS = (
    (_HARMONY, _HARMONY_PART, _named_match),
    (_TAGGED, _TAGGED, _tagged),
    (_MISTRAL, _MISTRAL, _mistral),
    (_DEEPSEEK, _DEEPSEEK_PART, _named_match),
    (_MARKED, _MARKED, lambda match: iter(_of_json(match[1].strip()))),
)
"""Where a call stands, what of the answer belongs to its calls, and how a call is read; the first that fits decides."""

"""Tool calls on the way to and from OpenAI-compatible servers, where arguments are JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from methods.toolkit.tool_parsing import calls_of_message


def sent(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Stored messages and tools as a request to a server holds them; without tools there is no field for them."""
    told = [_with_text_arguments(message) for message in messages]
    return {"messages": told, **({"tools": list(tools)} if tools else {})}


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def received(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `tasks.inference.Answer` that a server's message with calls fills; none for one without.

    Raises LookupError or TypeError for calls that are not as OpenAI's interface has them.
    """
    if not message.get("tool_calls"):
        return {}
    calls = calls_of_message(message)
    readable = [call for call in calls if isinstance(call["arguments"], dict)]
    return {
        "tool_calls": readable,
        "broken_calls": len(calls) - len(readable),
        "content": (message.get("content") or "").strip(),
    }

"""The tool calls in generated answers, read as the library reads those of a family it knows, else by our own parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from methods.toolkit.chat_template import found_once
from methods.toolkit.tool_parsing import Parsed, calls_of_message, parse_calls


def read_calls(tokenizer: Any, marked: str, prompt: list[int], tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """The calls of an answer (`marked`: with its special tokens) to a prompt with tools.

    A response template (of the tokenizer, or trl's for a published chat template) decides how they are written. Where
    there is none, or where it finds no call, our own parser reads them.
    """
    template = response_template(tokenizer)
    if template is not None and (found := _by_template(tokenizer, template, marked, prompt, tools)) is not None:
        return found
    return parse_calls(marked, tools)


def response_template(tokenizer: Any) -> dict[str, Any] | None:
    """How answers of this tokenizer's chat template are parsed, as far as the libraries know."""
    own = getattr(tokenizer, "response_template", None)
    found: dict[str, Any] | None = own if own else found_once(tokenizer, "response_template", _published)
    return found


def _published(tokenizer: Any) -> dict[str, Any] | None:
    """The response template that trl has for the published chat template that this one is, or is made of."""
    try:
        from trl import chat_template_utils
    except ImportError:  # an environment without trl
        return None

    class Known:
        def __init__(self, template: str) -> None:
            self.chat_template = template
            self.response_template: dict[str, Any] | None = None

    for name, text in vars(chat_template_utils).items():
        if name.endswith("_chat_template") and isinstance(text, str) and text in str(tokenizer.chat_template):
            known = Known(text)
            try:
                chat_template_utils.add_response_schema(known)
            except ValueError:  # a published template without one
                continue
            return known.response_template
    return None


def _by_template(
    tokenizer: Any,
    template: Mapping[str, Any],
    marked: str,
    prompt: list[int],
    tools: Sequence[Mapping[str, Any]],
) -> Parsed | None:
    """What the library reads; None if it reads no call, or fails at one that is broken."""
    try:
        message = tokenizer.parse_response(marked, template, prefix=tokenizer.decode(prompt), tools=list(tools))
        calls = calls_of_message(message)
    except Exception:  # the library raises whatever its readers raise on text that is broken
        return None
    readable = [call for call in calls if isinstance(call["name"], str) and isinstance(call["arguments"], dict)]
    if not calls:
        return None
    return Parsed(str(message.get("content") or "").strip(), readable, len(calls) - len(readable))

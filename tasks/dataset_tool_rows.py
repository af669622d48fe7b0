"""Rows of published function-calling data that are no list of messages: xLAM and Glaive."""

from __future__ import annotations

import json
import re
from typing import Any

from tasks.dataset_conversations import system_turns, tool_conversation
from tasks.dataset_fields import RowRefusedError, Turn, text, wrong_type
from tasks.dataset_reading import describe, excerpt
from tasks.dataset_tools import Tool, calls_of, parsed_json, read_tools, tools_of

_GLAIVE_TURN = re.compile(r"(?:\A|\n\s*\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = "<functioncall>"
_QUOTED_ARGUMENTS = re.compile(r"""("arguments"\s*:\s*)'(.*)'(\s*\}\s*)\Z""", re.DOTALL)
_decoder = json.JSONDecoder()


def xlam_body(row: dict[str, object], dropped: list[str]) -> dict[str, Any]:
    """xLAM's rows: a `query`, the calls that answer it (`answers`) and `tools`, the last two often JSON text."""
    tools = tools_of(row)
    calls = calls_of(row["answers"], "answers", tools, dropped)
    if not calls:
        raise wrong_type("answers", [], "a list of one call at least")
    asked = Turn("user", text(row["query"], "query"), "query")
    return tool_conversation(
        [*system_turns(row), asked, Turn("assistant", "", "answers", more={"tool_calls": calls})], tools
    )


def glaive_body(row: dict[str, object], dropped: list[str]) -> dict[str, Any]:
    """Glaive's rows: `system` with the functions as JSON, `chat` with the turns as one text."""
    system, described = _glaive_system(text(row["system"], "system"))
    tools = [*described, *tools_of(row)]
    turns = [Turn("system", system, "system")] if system else []
    for place, (speaker, said) in enumerate(_glaive_turns(text(row["chat"], "chat"))):
        turns.append(_glaive_turn(speaker, said, f"chat[{place}]", tools, dropped))
    return tool_conversation(turns, tools)


def _glaive_system(told: str) -> tuple[str, list[Tool]]:
    """The system message without the functions that it lists, and those."""
    told = told.strip().removeprefix("SYSTEM:").strip()
    start = next((place for place, character in enumerate(told) if character in "{["), None)
    if start is None:
        return told, []
    listed: list[object] = []
    place = start
    while place < len(told):
        try:
            found, place = _decoder.raw_decode(told, place)
        except ValueError as error:
            raise RowRefusedError(
                "broken_json",
                f"the functions in system are no JSON: {error}",
                field="system",
                found=excerpt(told[place:]),
                expected="one JSON object after the other",
                mend="correct the JSON, or remove the row",
            ) from None
        listed += found if isinstance(found, list) else [found]
        while place < len(told) and (told[place].isspace() or told[place] == ","):
            place += 1
    return told[:start].rstrip(" -\n"), read_tools(listed, "system")


def _glaive_turns(chat: str) -> list[tuple[str, str]]:
    """Who says what: the text is cut before the name of each speaker at the start of a paragraph."""
    names = list(_GLAIVE_TURN.finditer(chat))
    if not names or chat[: names[0].start()].strip():
        raise RowRefusedError(
            "wrong_type",
            f"chat does not begin with the name of a speaker: {excerpt(chat)}",
            field="chat",
            found=describe(chat),
            expected="USER: …, ASSISTANT: … and FUNCTION RESPONSE: …, with an empty line between turns",
            mend="write it so, or as a list of messages",
        )
    ends = [*(found.start() for found in names[1:]), len(chat)]
    return [(found[1], chat[found.end() : end].strip()) for found, end in zip(names, ends, strict=True)]


def _glaive_turn(speaker: str, said: str, field: str, tools: list[Tool], dropped: list[str]) -> Turn:
    said = said.replace("<|endoftext|>", "").strip()
    role = _GLAIVE_ROLES.get(speaker, "system")
    before, called, after = said.partition(_GLAIVE_CALL)
    if role != "assistant" or not called:
        return Turn(role, said, field)
    return Turn(
        role,
        before.strip(),
        field,
        more={"tool_calls": calls_of(_glaive_call(after.strip(), field), field, tools, dropped)},
    )


def _glaive_call(said: str, field: str) -> str:
    """A call as JSON text: Glaive puts the arguments, JSON themselves, between single quotes."""
    found = _QUOTED_ARGUMENTS.search(said)
    if found is None:
        return said
    arguments = parsed_json(found[2].replace("\\'", "'"), f"{field}.arguments", "an object of arguments")
    return f"{said[: found.start()]}{found[1]}{json.dumps(arguments, ensure_ascii=False)}{found[3]}"

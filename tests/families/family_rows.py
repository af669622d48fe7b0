"""Stored rows for the families' trains: about a light in a room, of every form that a family may render."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.families.family_models import Family

Row = dict[str, Any]

ROOMS = ("kitchen", "hall", "cellar", "garden", "attic", "office")
RULES = "You switch lights. Answer with the room and its light."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "switch_light",
            "description": "Switch the light of a room.",
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "description": "The room."},
                    "on": {"type": "boolean", "description": "Whether the light is to be on."},
                },
                "required": ["room", "on"],
            },
        },
    }
]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def question(room: str) -> Row:
    return user(f"switch the light in the {room} on")


def one_turn(_family: Family) -> list[Row]:
    return _chat([question(room), assistant(f"the {room} is on")] for room in ROOMS)


def many_turns(_family: Family) -> list[Row]:
    return _chat(
        [*_earlier_turns(room), user("and off"), assistant(f"{room} off"), user("thanks"), assistant("gladly")]
        for room in ROOMS
    )


def with_system(_family: Family) -> list[Row]:
    """Half of them with one turn, half with several."""
    rules = {"role": "system", "content": RULES}
    return _chat(
        [rules, *(_earlier_turns(room) if number % 2 else []), question(room), assistant(f"the {room} is on")]
        for number, room in enumerate(ROOMS)
    )


def with_thoughts(_family: Family) -> list[Row]:
    """One turn with a thought, one turn without, two turns with a thought each, in turn."""

    def thought(room: str) -> Row:
        return assistant(f"the {room} is on", reasoning_content=f"The user is in the {room}.")

    return _chat(
        (
            [question(room), thought(room)],
            [question(room), assistant(f"the {room} is on")],
            [question(room), thought(room), user("and the hall"), thought("hall")],
        )[number % 3]
        for number, room in enumerate(ROOMS)
    )


def with_tools(_family: Family) -> list[Row]:
    """A call and the answer to its result; a call alone; tools that no answer calls; in turn."""
    return [
        {"line": number + 1, "tools": TOOLS, "messages": _tool_messages(number, room)}
        for number, room in enumerate(ROOMS)
    ]


def preferences(_family: Family) -> list[Row]:
    """Prompts of one turn, of several, and with a system message, in turn, with a better and a worse answer."""
    return [
        {
            "line": number + 1,
            "prompt": prompt,
            "chosen": [assistant(f"the {room} is on")],
            "rejected": [assistant("the house is dark")],
        }
        for number, (room, prompt) in enumerate(zip(ROOMS, _prompts(), strict=True))
    ]


def prompts(_family: Family) -> list[Row]:
    """The same prompts, each with its better answer alone."""
    return _chat([*prompt, assistant(f"{room} on")] for room, prompt in zip(ROOMS, _prompts(), strict=True))


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON Lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answers_of(rows: Sequence[Row]) -> int:
    """How many answers the conversations of the rows have."""
    return sum(message["role"] == "assistant" for row in rows for message in row["messages"])


def _chat(conversations: Any) -> list[Row]:
    return [{"line": number + 1, "messages": messages} for number, messages in enumerate(conversations)]


def _earlier_turns(room: str) -> list[Row]:
    return [question(room), assistant(f"the {room} is on")]


def _prompts() -> list[list[Row]]:
    return [
        (
            [question(room)],
            [*_earlier_turns(room), user("and the hall")],
            [{"role": "system", "content": RULES}, question(room)],
        )[number % 3]
        for number, room in enumerate(ROOMS)
    ]


def _tool_messages(number: int, room: str) -> list[Row]:
    call = {
        "type": "function",
        "id": "call00001",
        "function": {"name": "switch_light", "arguments": {"room": room, "on": True}},
    }
    calling = assistant("", tool_calls=[call])
    result = {"role": "tool", "content": '{"on": true}', "tool_call_id": "call00001", "name": "switch_light"}
    return (
        [question(room), calling, result, assistant(f"the {room} is on")],
        [question(room), calling],
        [user("hello"), assistant("hello, which room?")],
    )[number % 3]

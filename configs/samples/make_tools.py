"""Writes the sample dataset of tool calls: what somebody says to a house, and the calls that do it.

    python configs/samples/make_tools.py [FOLDER]

Needs commands_en beside itself (make_commands.py writes it). FOLDER/tools_en (FOLDER: where this file lies) gets
train.jsonl, validation.jsonl and test.jsonl with the keys `messages` and `tools`, as OpenAI's interface has them. In
every sixth row the tool that is wanted is missing, and the answer says so; every eighth row of the training file goes
on with the results of its calls. Every run writes the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SIZES = {"train": 200, "validation": 20, "test": 40}
UNABLE = "None of my tools can do that."
DONE = "Done."
_PLACE = {"device": {"type": "string"}, "room": {"type": "string"}}
_TIME = {"time": {"type": "string", "description": "HH:MM; left out: now"}}


def tool(name: str, description: str, **own: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool for a device in a room, with parameters of its own, which it needs."""
    parameters = {
        "type": "object",
        "properties": {**_PLACE, **own, **_TIME},
        "required": [*_PLACE, *own],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("switch", "Switch a device on or off.", state={"type": "string", "enum": ["on", "off"]}),
    tool("set_level", "Set a device to a percentage.", level={"type": "integer", "minimum": 0, "maximum": 100}),
    tool("move", "Open or close blinds or a door.", position={"type": "string", "enum": ["open", "close"]}),
]
_OF_ACTION = {
    "on": ("switch", "state"),
    "off": ("switch", "state"),
    "open": ("move", "position"),
    "close": ("move", "position"),
}


def call(command: dict[str, Any], number: int) -> dict[str, Any]:
    """The call that carries a command out."""
    place = {name: command[name] for name in _PLACE}
    time = {"time": command["time"]} if "time" in command else {}
    if command["action"] == "set":
        name, own = "set_level", {"level": command["level"]}
    else:
        name, parameter = _OF_ACTION[command["action"]]
        own = {parameter: command["action"]}
    function = {"name": name, "arguments": json.dumps({**place, **own, **time})}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def row(number: int, command: dict[str, str], *, goes_on: bool) -> dict[str, Any]:
    """A conversation about the commands of one row of commands_en."""
    asked = {"role": "user", "content": command["prompt"]}
    calls = [call(each, place) for place, each in enumerate(json.loads(command["completion"]), start=1)]
    if number % 6 == 5:
        wanted = {each["function"]["name"] for each in calls}
        rest = [each for each in TOOLS if each["function"]["name"] not in wanted]
        return {"messages": [asked, {"role": "assistant", "content": UNABLE}], "tools": rest}
    messages = [asked, {"role": "assistant", "content": "", "tool_calls": calls}]
    if goes_on and number % 8 == 7:
        results = [{"role": "tool", "tool_call_id": each["id"], "content": '{"ok": true}'} for each in calls]
        messages += [*results, {"role": "assistant", "content": DONE}]
    return {"messages": messages, "tools": TOOLS}


def main(target: Path) -> None:
    """Write the three files."""
    source, folder = Path(__file__).resolve().parent / "commands_en", target / "tools_en"
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        commands = [json.loads(line) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row(number, each, goes_on=split == "train") for number, each in enumerate(commands[:size])]
        text = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)

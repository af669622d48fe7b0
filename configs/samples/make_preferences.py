"""Writes sample datasets of better and worse answers: the commands of commands_en, meant right and meant wrong.

    python configs/samples/make_preferences.py [FOLDER]

Needs commands_en beside itself (make_commands.py writes it). FOLDER/preferences_en holds pairs with the keys `prompt`,
`chosen` and `rejected`, FOLDER/rankings_en three answers a prompt with the keys `prompt`, `answers` and `scores`
(FOLDER: where this file lies), each as train.jsonl, validation.jsonl and test.jsonl. The right answer is the one of
commands_en. A worse one is the right command in a sentence (scored 1 of 2), the worst one is a command that was not
meant (0): with another room, device, action, level or time, or with a part left out. The seed is fixed: every run
writes the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from configs.samples.make_commands import DIMMED, EVENING, MORNING, MOVED, ROOMS, SWITCHED, clock, write_rows

SEED = 20261125
SIZES = {"train": 240, "validation": 40, "test": 60}
COMMANDS = Path(__file__).resolve().parent / "commands_en"
SENTENCES = (
    "Sure! Here is the command: {}",
    "{} Let me know if you need anything else.",
    "I would do this: {}",
    "Okay, {}",
)

Command = dict[str, Any]


def written(commands: list[Command]) -> str:
    """Commands as compact JSON."""
    return json.dumps(commands, ensure_ascii=False, separators=(",", ":"))


def other(random: Random, values: tuple[Any, ...], value: Any) -> Any:
    """One of the values that is not this one."""
    return random.choice([each for each in values if each != value])


def misread(random: Random, commands: list[Command]) -> list[Command]:
    """The commands with one thing that was not said: another value, or a part that is missing."""
    index = random.randrange(len(commands))
    command = dict(commands[index])
    ways = ["room", "device", "action", *[key for key in ("level", "time") if key in command]]
    ways += ["no time"] if "time" in command else []
    ways += ["no command"] if len(commands) > 1 else []
    way = random.choice(ways)
    if way == "no command":
        return commands[:index] + commands[index + 1 :]
    if way == "no time":
        del command["time"]
    elif way == "room":
        command["room"] = other(random, ROOMS, command["room"])
    elif way == "device":
        alike = {"set": DIMMED, "open": MOVED, "close": MOVED}.get(command["action"], SWITCHED)
        command["device"] = other(random, alike, command["device"])
    elif way == "action":
        opposite = {"on": "off", "off": "on", "open": "close", "close": "open", "set": "off"}
        command["action"] = opposite[command["action"]]
        command.pop("level", None)
    elif way == "level":
        command["level"] = other(random, tuple(range(10, 101, 10)), command["level"])
    else:
        times = tuple(clock(hour, minute) for hour in MORNING + EVENING for minute in (0, 15, 30))
        command["time"] = other(random, times, command["time"])
    return [*commands[:index], command, *commands[index + 1 :]]


def make_row(random: Random, row: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pair and a ranking of one command."""
    right = row["completion"]
    wordy = random.choice(SENTENCES).format(right)
    wrong = written(misread(random, json.loads(right)))
    pair = {"prompt": row["prompt"], "chosen": right, "rejected": random.choice((wrong, wrong, wordy))}
    ranked = [(right, 2), (wordy, 1), (wrong, 0)]
    random.shuffle(ranked)
    answers, scores = ([each[part] for each in ranked] for part in (0, 1))
    return pair, {"prompt": row["prompt"], "answers": answers, "scores": scores}


def main(folder: Path) -> None:
    """Write every split of both datasets under `folder`."""
    random = Random(SEED)  # noqa: S311 - a dataset, not a secret
    for split, size in SIZES.items():
        lines = (COMMANDS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:size]
        made = [make_row(random, json.loads(line)) for line in lines]
        for name, part in (("preferences_en", 0), ("rankings_en", 1)):
            write_rows(folder / name / f"{split}.jsonl", [each[part] for each in made])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)

"""Writes the sample datasets: what somebody says to a house or an office, and the command that is meant.

    python configs/samples/make_commands.py [FOLDER]

English goes to FOLDER/commands_en, Chinese to FOLDER/commands_zh (FOLDER: where this file lies), each as
train.jsonl, validation.jsonl and test.jsonl with the keys `prompt` and `completion`. The seed is fixed: every
run writes the same bytes. The answer is compact JSON, always a list, one object a command, keys in the
order device, room, action, level (percent), time (24 hours). What makes it unambiguous: a time without a part
of the day is read on a 24-hour clock; "half" is 50, "maximum" 100; a place or an action said once for two
devices holds for both.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")

SEED = 20261121
SWITCHED = ("light", "heater", "fan", "tv", "speaker", "coffee_machine")
DIMMED = ("light", "heater", "fan", "speaker")
MOVED = ("blinds", "door")
ROOMS = ("kitchen", "bedroom", "living_room", "bathroom", "office", "hallway", "meeting_room", "garage")
MORNING = (7, 8, 9)
EVENING = (19, 20, 21)


@dataclass(frozen=True)
class Command:
    """One command in its normal form; `level` is a percentage, `time` reads HH:MM."""

    device: str
    room: str
    action: str
    level: int | None = None
    time: str | None = None

    def answer(self) -> dict[str, str | int]:
        """The command as it is written: only what was said, always in the same order."""
        return {key: value for key, value in vars(self).items() if value is not None}


Sentence = tuple[str, list[Command]]


@dataclass(frozen=True)
class Language:
    """How to say commands in one language, and how many rows each split gets."""

    folder: str
    sizes: dict[str, int]
    say: Callable[[Random], Sentence]
    wrap: Callable[[Random, str], str]


def pick(random: Random, choices: Sequence[T]) -> T:
    """One of `choices`. Of all methods of Random, only random() is promised to stay the same for a seed."""
    return choices[int(random.random() * len(choices))]


def draw_command(random: Random) -> Command:
    """A device in a room and something it can do, without level and time."""
    kind = pick(random, ("switched", "switched", "dimmed", "moved"))
    if kind == "switched":
        return Command(pick(random, SWITCHED), pick(random, ROOMS), pick(random, ("on", "off")))
    if kind == "dimmed":
        level = 5 * (1 + int(random.random() * 20))
        return Command(pick(random, DIMMED), pick(random, ROOMS), "set", level=level)
    return Command(pick(random, MOVED), pick(random, ROOMS), pick(random, ("open", "close")))


def draw_pair(random: Random) -> list[Command]:
    """Two commands for different devices, at most one of them with a level."""
    while True:
        first, second = draw_command(random), draw_command(random)
        if first.device != second.device and (first.level is None or second.level is None):
            return [first, second]


def draw_switched_pair(random: Random) -> tuple[str, str]:
    """Two different devices that can be switched on and off."""
    while True:
        first, second = pick(random, SWITCHED), pick(random, SWITCHED)
        if first != second:
            return first, second


def draw_time(random: Random) -> tuple[int, int]:
    """Hour and minute; quarters more often than the rest, as people say them."""
    minute = pick(random, (0, 15, 30, 45, 5 * int(random.random() * 12)))
    return pick(random, MORNING + EVENING), minute


def clock(hour: int, minute: int) -> str:
    """The normal form of a time."""
    return f"{hour:02}:{minute:02}"


def with_time(command: Command, time: str) -> Command:
    """The same command, to be done at `time`."""
    return Command(command.device, command.room, command.action, command.level, time)


# English

EN_DEVICES = {
    "light": ("light", "lamp", "lights"),
    "heater": ("heater", "radiator", "heating"),
    "fan": ("fan", "ventilator"),
    "tv": ("tv", "television", "telly"),
    "speaker": ("speaker", "stereo"),
    "coffee_machine": ("coffee machine", "coffee maker"),
    "blinds": ("blinds", "shades", "shutters"),
    "door": ("door",),
}
EN_ROOMS = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom",),
    "living_room": ("living room", "lounge", "sitting room"),
    "bathroom": ("bathroom", "washroom"),
    "office": ("office", "study"),
    "hallway": ("hallway", "hall", "corridor"),
    "meeting_room": ("meeting room", "conference room"),
    "garage": ("garage",),
}
EN_ACTIONS = {
    "on": ("turn on {}", "turn {} on", "switch on {}", "switch {} on", "start {}", "power up {}"),
    "off": ("turn off {}", "turn {} off", "switch off {}", "switch {} off", "stop {}", "shut down {}"),
    "open": ("open {}",),
    "close": ("close {}", "shut {}"),
    "set": ("set {} to", "bring {} to", "put {} at", "adjust {} to"),
}
EN_HOURS = {7: "seven", 8: "eight", 9: "nine"}
EN_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
EN_WRAPPERS = ("{}", "{}", "please {}", "{}, please", "hey, {}", "hello, {}, thanks")
# These read on into a verb, so not into "at seven, …".
EN_VERB_WRAPPERS = ("could you {}?", "can you please {}?", "I need you to {}", "I'd like you to {}")


def en_level(random: Random, level: int) -> str:
    """A percentage in digits or, a round one, in words."""
    special = {50: "half", 100: "maximum"}
    if level in special and random.random() < 0.5:
        return special[level]
    if level % 10 or level == 100 or random.random() < 0.3:
        return pick(random, (f"{level} percent", f"{level}%"))
    return f"{EN_TENS[level // 10]} percent"


def en_time(random: Random) -> tuple[str, str]:
    """A time as it is said, and its normal form."""
    if random.random() < 0.15:
        return pick(random, (("noon", "12:00"), ("midnight", "00:00")))
    if random.random() < 0.4:
        hour, minute = draw_time(random)
        return f"{hour}:{minute:02}", clock(hour, minute)
    hour, minute = pick(random, MORNING), pick(random, (0, 15, 30))
    name = EN_HOURS[hour]
    said = {0: f"{name} o'clock", 15: f"quarter past {name}", 30: f"half past {name}"}[minute]
    return said + pick(random, ("", " in the morning")), clock(hour, minute)


def en_thing(random: Random, command: Command) -> str:
    """The device and where it is."""
    device, room = pick(random, EN_DEVICES[command.device]), pick(random, EN_ROOMS[command.room])
    return pick(random, (f"the {room} {device}", f"the {device} in the {room}"))


def en_clause(random: Random, command: Command, thing: str) -> str:
    """One command without its time."""
    clause = pick(random, EN_ACTIONS[command.action]).format(thing)
    return clause if command.level is None else f"{clause} {en_level(random, command.level)}"


def en_one(random: Random) -> Sentence:
    """One command, now or at a time."""
    command = draw_command(random)
    clause = en_clause(random, command, en_thing(random, command))
    if random.random() < 0.25:
        return clause, [command]
    said, time = en_time(random)
    sentence = f"at {said}, {clause}" if random.random() < 0.25 else f"{clause} at {said}"
    return sentence, [with_time(command, time)]


def en_two(random: Random) -> Sentence:
    """Two commands, each with a place of its own, in one place, or one action for two devices."""
    return pick(random, (en_two_places, en_two_places, en_one_place, en_one_action))(random)


def en_two_places(random: Random) -> Sentence:
    """Two commands, each with its own place."""
    pair = draw_pair(random)
    clauses = [en_clause(random, command, en_thing(random, command)) for command in pair]
    return pick(random, (" and ", ", then ", " and then ")).join(clauses), pair


def en_one_place(random: Random) -> Sentence:
    """Two commands, the place said once and first."""
    first, second = draw_pair(random)
    pair = [first, Command(second.device, first.room, second.action, second.level)]
    things = [f"the {pick(random, EN_DEVICES[command.device])}" for command in pair]
    clauses = [en_clause(random, command, thing) for command, thing in zip(pair, things, strict=True)]
    return f"in the {pick(random, EN_ROOMS[first.room])}, {' and '.join(clauses)}", pair


def en_one_action(random: Random) -> Sentence:
    """Two commands, the action and the place said once."""
    room, action = pick(random, ROOMS), pick(random, ("on", "off"))
    pair = [Command(device, room, action) for device in draw_switched_pair(random)]
    things = " and ".join(f"the {pick(random, EN_DEVICES[command.device])}" for command in pair)
    return f"{pick(random, ('turn', 'switch'))} {action} {things} in the {pick(random, EN_ROOMS[room])}", pair


def en_wrap(random: Random, sentence: str) -> str:
    """The sentence with a courtesy around it, and a capital and a full stop or not."""
    opens_with_verb = not sentence.startswith(("at ", "in "))
    wrapped = pick(random, EN_WRAPPERS + EN_VERB_WRAPPERS * opens_with_verb).format(sentence)
    if random.random() < 0.5:
        wrapped = wrapped[0].upper() + wrapped[1:]
    return wrapped if wrapped.endswith("?") else wrapped + pick(random, ("", "."))


# Chinese

ZH_DEVICES = {
    "light": ("灯", "电灯", "照明灯"),
    "heater": ("暖气", "取暖器", "电暖器"),
    "fan": ("风扇", "电扇", "电风扇"),
    "tv": ("电视", "电视机"),
    "speaker": ("音箱", "音响"),
    "coffee_machine": ("咖啡机",),
    "blinds": ("百叶窗", "窗帘"),
    "door": ("门", "房门"),
}
ZH_ROOMS = {
    "kitchen": ("厨房",),
    "bedroom": ("卧室", "睡房"),
    "living_room": ("客厅", "起居室"),
    "bathroom": ("浴室", "卫生间"),
    "office": ("办公室", "书房"),
    "hallway": ("走廊", "过道"),
    "meeting_room": ("会议室",),
    "garage": ("车库",),
}
ZH_ACTIONS = {
    "on": ("打开{}", "开启{}", "把{}打开", "启动{}"),
    "off": ("关掉{}", "关闭{}", "把{}关掉", "把{}关上"),
    "open": ("打开{}", "把{}打开"),
    "close": ("关上{}", "关闭{}", "把{}关上"),
    "set": ("把{}调到", "将{}设为", "把{}设置为"),
}
ZH_DIGITS = "零一二三四五六七八九十"
ZH_WRAPPERS = (
    "{}",
    "{}",
    "请{}",
    "请帮我{}",
    "麻烦{}",
    "麻烦你{}，谢谢",
    "能不能{}？",
    "可以{}吗？",
    "你好，{}",
)


def zh_number(number: int) -> str:
    """A number from 0 to 99 in Chinese words."""
    tens, units = divmod(number, 10)
    if not tens:
        return ZH_DIGITS[units]
    return (ZH_DIGITS[tens] if tens > 1 else "") + "十" + (ZH_DIGITS[units] if units else "")


def zh_level(random: Random, level: int) -> str:
    """A percentage in digits or in words."""
    special = {50: "一半", 100: "最大"}
    if level in special and random.random() < 0.5:
        return special[level]
    if level == 100 or random.random() < 0.5:
        return f"{level}%"
    return f"百分之{zh_number(level)}"


def zh_time(random: Random) -> tuple[str, str]:
    """A time as it is said, and its normal form."""
    if random.random() < 0.15:
        return pick(random, (("中午十二点", "12:00"), ("零点", "00:00")))
    hour, minute = draw_time(random)
    style = pick(random, ("24 hours", "12 hours", "words"))
    if style == "24 hours":
        return f"{hour}:{minute:02}", clock(hour, minute)
    half = hour - 12 if hour > 12 else hour
    part = "晚上" if hour > 12 else pick(random, ("早上", "上午"))
    if style == "12 hours":
        return f"{part}{half}点{f'{minute:02}分' if minute else ''}", clock(hour, minute)
    minute = minute // 15 * 15
    said = {0: "点", 15: "点一刻", 30: "点半", 45: "点三刻"}[minute]
    return f"{part}{zh_number(half)}{said}", clock(hour, minute)


def zh_thing(random: Random, command: Command) -> str:
    """The device and where it is."""
    device, room = pick(random, ZH_DEVICES[command.device]), pick(random, ZH_ROOMS[command.room])
    return pick(random, (f"{room}的{device}", f"{room}里的{device}"))


def zh_clause(random: Random, command: Command, thing: str) -> str:
    """One command without its time."""
    clause = pick(random, ZH_ACTIONS[command.action]).format(thing)
    return clause if command.level is None else f"{clause}{zh_level(random, command.level)}"


def zh_one(random: Random) -> Sentence:
    """One command, now or at a time."""
    command = draw_command(random)
    clause = zh_clause(random, command, zh_thing(random, command))
    if random.random() < 0.25:
        return clause, [command]
    said, time = zh_time(random)
    return pick(random, (f"{said}{clause}", f"在{said}{clause}")), [with_time(command, time)]


def zh_two(random: Random) -> Sentence:
    """Two commands, each with a place of its own, or one action for two devices in one place."""
    if random.random() < 0.7:
        pair = draw_pair(random)
        clauses = [zh_clause(random, command, zh_thing(random, command)) for command in pair]
        frame = pick(random, ("{}，然后{}", "{}，再{}", "{}，并{}", "先{}，再{}"))
        return frame.format(*clauses), pair
    room, action = pick(random, ROOMS), pick(random, ("on", "off"))
    pair = [Command(device, room, action) for device in draw_switched_pair(random)]
    devices = [pick(random, ZH_DEVICES[command.device]) for command in pair]
    things = f"{pick(random, ZH_ROOMS[room])}的{devices[0]}和{devices[1]}"
    return pick(random, ZH_ACTIONS[action]).format(things), pair


def zh_wrap(random: Random, sentence: str) -> str:
    """The sentence with a courtesy around it and a full stop or not."""
    wrapped = pick(random, ZH_WRAPPERS).format(sentence)
    return wrapped if wrapped.endswith("？") else wrapped + pick(random, ("", "。"))


# Splits and files


def en_say(random: Random) -> Sentence:
    """One or two commands in English."""
    return en_two(random) if random.random() < 0.35 else en_one(random)


def zh_say(random: Random) -> Sentence:
    """One or two commands in Chinese."""
    return zh_two(random) if random.random() < 0.35 else zh_one(random)


LANGUAGES = (
    Language("commands_en", {"train": 480, "validation": 40, "test": 60}, en_say, en_wrap),
    Language("commands_zh", {"train": 300, "validation": 40, "test": 60}, zh_say, zh_wrap),
)


def make_rows(language: Language, count: int) -> list[dict[str, str]]:
    """`count` rows, no two with the same sentence: a courtesy alone does not make a row a new one."""
    random = Random(SEED)  # noqa: S311 - a dataset, not a secret
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        sentence, commands = language.say(random)
        prompt = language.wrap(random, sentence)
        answer = [command.answer() for command in commands]
        completion = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        rows.setdefault(sentence, {"prompt": prompt, "completion": completion})
    return list(rows.values())


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """JSON Lines, UTF-8, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def main(folder: Path) -> None:
    """Write every split of every language under `folder`."""
    for language in LANGUAGES:
        rows = make_rows(language, sum(language.sizes.values()))
        for split, size in language.sizes.items():
            write_rows(folder / language.folder / f"{split}.jsonl", rows[:size])
            rows = rows[size:]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)

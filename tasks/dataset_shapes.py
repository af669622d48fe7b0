"""What a row means: its shape is recognised, and it becomes a conversation or a Problem that says why not."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.datasets import Columns, Problem, RequestedShape, Shape
from configs.errors import UserError
from tasks.dataset_reading import ParsedRow, describe, excerpt, inspect_file, read_objects, shown

SAMPLED_ROWS = 20
MAX_EXTRA_CHARACTERS = 256
PLAIN_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("query", "response"),
)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_OWN_COLUMNS = Columns()
_ALPACA = Columns(prompt="instruction", completion="output")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_ACCEPTED = (
    "prompt/completion (or question/answer, instruction/response, query/response), messages, "
    "Alpaca (instruction, output) or ShareGPT (conversations)"
)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How the rows of a file are read.

    `columns` are those of prompt and completion, None for shapes that have columns of their own.
    `named`: the user named the columns, they were not recognised.
    """

    shape: Shape
    columns: Columns = _OWN_COLUMNS
    named: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns each row must have."""
        if self.shape == "prompt_completion":
            return tuple(name for name in (self.columns.prompt, self.columns.completion) if name is not None)
        return _REQUIRED[self.shape]


_REQUIRED = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation; its last message is the answer."""

    messages: list[dict[str, str]]
    line: int
    row: int
    extra: dict[str, object]
    dropped: tuple[str, ...]
    columns: tuple[str, ...]
    stored: bytes
    content: bytes

    @property
    def prompt_characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages[:-1])

    @property
    def answer_characters(self) -> int:
        return len(self.messages[-1]["content"])

    @property
    def turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)


class _Turn(NamedTuple):
    """A message and where in the row it came from."""

    role: str
    content: str
    field: str


class _RowRefusedError(Exception):
    """Why one row cannot be used; its place in the file is added by whoever knows it."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        field: str,
        found: str,
        expected: str,
        mend: str,
    ) -> None:
        self.problem = Problem(kind=kind, message=message, field=field, found=found, expected=expected, mend=mend)
        super().__init__(message)


def choose_layout(path: Path, columns: Columns | None, shape: RequestedShape) -> RowLayout | None:
    """How to read the rows of the file: as told, else recognised from its first objects.

    Returns None if no row of the file is an object. Raises UserError for preference pairs, vision-language
    data, a shape that is not known or not clear, and columns given for a shape that has its own.
    """
    columns = columns or Columns()
    named = columns.prompt is not None or columns.completion is not None
    if named and shape not in ("auto", "prompt_completion"):
        raise UserError(
            f"columns are named, but rows of the shape {shape} have columns of their own",
            file=path,
            mend="leave out the columns, or the shape",
        )
    both_named = columns.prompt is not None and columns.completion is not None
    if both_named and (columns != _ALPACA or shape == "prompt_completion"):
        return RowLayout("prompt_completion", columns, named=True)
    rows = (item for item in read_objects(path, inspect_file(path)) if isinstance(item, ParsedRow))
    sample = list(itertools.islice(rows, SAMPLED_ROWS))
    if not sample:
        return None
    if not named:
        _refuse_other_tasks(path, sample[0])
    if shape in ("alpaca", "messages", "sharegpt"):
        return RowLayout(shape)
    for item in sample:
        candidates = _candidates(item.value, columns, shape)
        if len(candidates) > 1:
            raise _ambiguous(path, item, candidates)
        if candidates:
            return candidates[0]
    raise _unrecognised(path, sample[0], columns)


def read_rows(path: Path, columns: Columns | None = None, shape: RequestedShape = "auto") -> Iterator[Row | Problem]:
    """The rows of the file in order: each a Row, or the Problem in its place.

    Streamed: memory does not grow with the file. Raises UserError where the file as a whole cannot be used.
    """
    yield from convert_rows(path, choose_layout(path, columns, shape))


def convert_rows(path: Path, layout: RowLayout | None) -> Iterator[Row | Problem]:
    """`read_rows` for a layout that `choose_layout` returned for this file."""
    for item in read_objects(path, inspect_file(path)):
        if isinstance(item, Problem):
            yield item
        elif layout is not None:
            yield convert_row(item, layout)


def convert_row(parsed: ParsedRow, layout: RowLayout) -> Row | Problem:
    """Turn one object into a conversation, or say what is wrong with it."""
    try:
        return _convert(parsed, layout)
    except _RowRefusedError as refusal:
        return refusal.problem.model_copy(update={"line": parsed.line, "row": parsed.row})


def _candidates(row: dict[str, object], columns: Columns, shape: RequestedShape) -> list[RowLayout]:
    pairs = [pair for pair in PLAIN_PAIRS if set(pair) <= row.keys()]
    if columns.prompt or columns.completion:
        return _half_named(row, columns)
    found = [RowLayout("prompt_completion", Columns(prompt=one, completion=other)) for one, other in pairs]
    if shape == "prompt_completion":
        return found
    shapes: tuple[Shape, ...] = ("alpaca", "messages", "sharegpt")
    return found + [RowLayout(other) for other in shapes if row.keys() >= set(_REQUIRED[other])]


def _half_named(row: dict[str, object], columns: Columns) -> list[RowLayout]:
    """Layouts for columns of which one, or Alpaca's two, are named; the other goes by its usual names."""
    if columns == _ALPACA:
        if not {"instruction", "output"} <= row.keys():
            return []
        # As prompt and completion, the `input` of an Alpaca row would not reach the model.
        return [RowLayout("alpaca") if "input" in row else RowLayout("prompt_completion", columns, named=True)]
    prompts = [columns.prompt] if columns.prompt else [prompt for prompt, _ in PLAIN_PAIRS]
    answers = [columns.completion] if columns.completion else [answer for _, answer in PLAIN_PAIRS]
    return [
        RowLayout("prompt_completion", Columns(prompt=prompt, completion=answer), named=True)
        for prompt in prompts
        for answer in dict.fromkeys(answers)
        if prompt in row and answer in row and prompt != answer
    ]


def _refuse_other_tasks(path: Path, item: ParsedRow) -> None:
    for check in (_refuse_preferences, _refuse_media):
        try:
            check(item.value)
        except _RowRefusedError as refusal:
            problem = refusal.problem
            raise UserError(
                problem.message,
                file=path,
                line=item.line,
                field=problem.field,
                expected=problem.expected,
                mend=problem.mend,
            ) from None


def _refuse_preferences(row: dict[str, object]) -> None:
    if {"chosen", "rejected"} <= row.keys():
        raise _RowRefusedError(
            "preference_pairs",
            "these are preference pairs; sft trains on answers",
            field="chosen, rejected",
            found="a chosen and a rejected answer",
            expected="rows with one answer each",
            mend="train with a preference method, or keep only the prompt and the chosen answer of each row",
        )


def _refuse_media(row: dict[str, object]) -> None:
    media = next((name for name in _MEDIA if row.get(name)), None)
    if media is not None:
        raise _RowRefusedError(
            "vision_language",
            f"this is vision-language data (it has {media}); sft trains on text alone",
            field=media,
            found=describe(row[media]),
            expected="rows of text",
            mend=f"train it with a vision-language method, or remove the column {media}",
        )


def _ambiguous(path: Path, item: ParsedRow, candidates: list[RowLayout]) -> UserError:
    shapes = ", ".join(f"{layout.shape} ({'/'.join(layout.required)})" for layout in candidates)
    return UserError(
        f"the rows can be read in more than one way: {shapes}",
        file=path,
        line=item.line,
        expected="one clear shape",
        mend="name the prompt and the completion column, or the shape",
    )


def _unrecognised(path: Path, item: ParsedRow, columns: Columns) -> UserError:
    there = list(item.value)
    wanted = [name for name in (columns.prompt, columns.completion) if name is not None]
    missing = [name for name in wanted if name not in item.value]
    problem = f"the shape of the rows is not recognised; their columns are: {_listing(there)}"
    if missing:
        problem = f"there is no column {missing[0]!r}{_nearest(missing[0], there)}; there are: {_listing(there)}"
    elif wanted:
        problem = f"only the column {wanted[0]!r} is named, and the other is not clear among: {_listing(there)}"
    return UserError(
        problem,
        file=path,
        line=item.line,
        field=missing[0] if missing else None,
        expected=_ACCEPTED,
        mend="name the column of the prompt and the column of the completion",
    )


def _convert(parsed: ParsedRow, layout: RowLayout) -> Row:
    row = parsed.value
    _require_columns(row, layout)
    dropped: list[str] = []
    if layout.shape == "alpaca":
        turns, used = _alpaca_turns(row)
    elif layout.shape == "prompt_completion":
        turns, used = _pair_turns(row, *layout.required)
    else:
        turns, used = _conversation(row, layout, dropped)
    _require_content(turns)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    extra = {name: value for name, value in row.items() if name not in used}
    kept = {name: value for name, value in extra.items() if _is_small_scalar(value)}
    dropped += [name for name in extra if name not in kept]
    stored, content = _encode(messages, parsed, kept, layout)
    return Row(messages, parsed.line, parsed.row, kept, tuple(dropped), tuple(row), stored, content)


def _require_columns(row: dict[str, object], layout: RowLayout) -> None:
    if not layout.named:
        # Whoever named the columns has said what the others are not.
        _refuse_preferences(row)
        _refuse_media(row)
    missing = [name for name in layout.required if name not in row]
    if not missing:
        return
    others = [] if layout.named else _candidates(row, Columns(), "auto")
    if others:
        raise _RowRefusedError(
            "other_shape",
            f"the row has the shape {others[0].shape} ({', '.join(others[0].required)}), "
            f"the file's first rows {layout.shape} ({', '.join(layout.required)})",
            field=missing[0],
            found=f"the columns {_listing(list(row))}",
            expected=f"the columns {', '.join(layout.required)}",
            mend="put rows of different shapes into files of their own",
        )
    there = list(row)
    raise _RowRefusedError(
        "missing_column",
        f"the row has no column {missing[0]!r}{_nearest(missing[0], there)}; its columns: {_listing(there)}",
        field=missing[0],
        found=f"the columns {_listing(there)}",
        expected=f"the columns {', '.join(layout.required)}",
        mend="add the column to the row, or name the right one",
    )


def _pair_turns(row: dict[str, object], prompt: str, completion: str) -> tuple[list[_Turn], set[str]]:
    turns = [
        _Turn("user", _text(row[prompt], prompt), prompt),
        _Turn("assistant", _text(row[completion], completion), completion),
    ]
    return turns, {prompt, completion}


def _alpaca_turns(row: dict[str, object]) -> tuple[list[_Turn], set[str]]:
    turns = _system_turns(row) + _history_turns(row.get("history"))
    asked = _text(row["instruction"], "instruction")
    if (given := _optional_text(row, "input")).strip():
        asked = f"{asked}\n\n{given}"
    turns.append(_Turn("user", asked, "instruction"))
    turns.append(_Turn("assistant", _text(row["output"], "output"), "output"))
    return turns, {"instruction", "input", "output", "system", "history"}


def _system_turns(row: dict[str, object]) -> list[_Turn]:
    system = _optional_text(row, "system")
    return [_Turn("system", system, "system")] if system.strip() else []


def _history_turns(history: object) -> list[_Turn]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise _wrong_type("history", history, "a list of [question, answer] pairs")
    turns = []
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong_type(field, pair, "a pair [question, answer]")
        for role, side in (("user", 0), ("assistant", 1)):
            turns.append(_Turn(role, _text(pair[side], f"{field}[{side}]"), f"{field}[{side}]"))
    return turns


def _conversation(row: dict[str, object], layout: RowLayout, dropped: list[str]) -> tuple[list[_Turn], set[str]]:
    """The messages of an OpenAI or ShareGPT row, with a `system` column before them if there is one."""
    column = layout.required[0]
    listed = row[column]
    if not isinstance(listed, list):
        raise _wrong_type(column, listed, "a list of messages")
    if not listed:
        raise _RowRefusedError(
            "empty_messages",
            f"the list {column} is empty",
            field=column,
            found="an empty list",
            expected="a user message and an assistant message at least",
            mend="remove the row",
        )
    turns = _system_turns(row)
    turns += [_turn(item, f"{column}[{index}]", layout, dropped) for index, item in enumerate(listed)]
    return turns, {column, "system"}


def _turn(turn: object, field: str, layout: RowLayout, dropped: list[str]) -> _Turn:
    openai = layout.shape == "messages"
    role_key, text_key = ("role", "content") if openai else ("from", "value")
    if not isinstance(turn, dict):
        raise _wrong_type(field, turn, f"an object with {role_key} and {text_key}")
    _refuse_tool_calls(turn, field)
    for key in (role_key, text_key):
        if key not in turn:
            raise _RowRefusedError(
                "missing_key",
                f"{field} has no {key!r}; it has: {_listing(list(turn))}",
                field=f"{field}.{key}",
                found=_listing(list(turn)),
                expected=f"{role_key} and {text_key}",
                mend=f"give the message a {key!r}",
            )
    role = _role(turn[role_key], f"{field}.{role_key}", _OPENAI_ROLES if openai else _SHAREGPT_ROLES)
    for key in turn:
        name = f"{layout.required[0]}[].{key}"
        if key not in (role_key, text_key) and name not in dropped:
            dropped.append(name)
    text_field = f"{field}.{text_key}"
    return _Turn(role, _text(turn[text_key], text_field), text_field)


def _refuse_tool_calls(turn: dict[str, object], field: str) -> None:
    called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if called is not None:
        raise _RowRefusedError(
            "tool_calls",
            f"{field} calls a tool, which sft does not train",
            field=f"{field}.{called}",
            found=describe(turn[called]),
            expected="messages of text",
            mend="remove the row, or write the call as text",
        )


def _role(value: object, field: str, roles: dict[str, str]) -> str:
    if isinstance(value, str) and value in roles:
        return roles[value]
    known = ", ".join(roles)
    nearest = _nearest(value, list(roles)) if isinstance(value, str) else ""
    raise _RowRefusedError(
        "unknown_role",
        f"unknown role: {describe(value)}{nearest}",
        field=field,
        found=describe(value),
        expected=known,
        mend=f"use one of: {known}",
    )


def _require_content(turns: list[_Turn]) -> None:
    """Refuse conversations that hold nothing to learn from, or that chat templates cannot render."""
    last = turns[-1]
    if last.role != "assistant":
        raise _RowRefusedError(
            "last_not_assistant",
            f"the last message is of the role {last.role}, so there is no answer to learn",
            field=last.field,
            found=last.role,
            expected="assistant",
            mend="end the conversation with an answer, or cut what follows the last one",
        )
    if not any(turn.role == "user" for turn in turns):
        raise _RowRefusedError(
            "no_user_message",
            "no message is of the user, so there is no prompt",
            field=turns[0].field,
            found=", ".join(turn.role for turn in turns[:5]),
            expected="a user message before the answer",
            mend="add what was asked",
        )
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise _RowRefusedError(
                "system_not_first",
                f"message {index + 1} is of the system; only the first may be",
                field=turn.field,
                found="system",
                expected="user or assistant",
                mend="join the system messages into one at the start",
            )
        if not turn.content.strip():
            raise _empty(turn)


def _empty(turn: _Turn) -> _RowRefusedError:
    name = {"assistant": "answer", "user": "prompt", "system": "system"}[turn.role]
    return _RowRefusedError(
        f"empty_{name}",
        f"the {name} is empty" if name != "system" else "the system message is empty",
        field=turn.field,
        found=describe(turn.content),
        expected="text",
        mend="fill it in or remove the row",
    )


def _text(value: object, field: str) -> str:
    if isinstance(value, str):
        return value
    raise _wrong_type(field, value, "text")


def _optional_text(row: dict[str, object], field: str) -> str:
    value = row.get(field)
    return "" if value is None else _text(value, field)


def _wrong_type(field: str, value: object, expected: str) -> _RowRefusedError:
    found = describe(value)
    return _RowRefusedError(
        "wrong_type",
        f"{field} is {found} where {expected} is expected",
        field=field,
        found=found,
        expected=expected,
        mend="put it in quotes" if isinstance(value, int | float) else "write it so, or remove the row",
    )


def _is_small_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_EXTRA_CHARACTERS
    if isinstance(value, float):
        return math.isfinite(value)  # 1e999 is JSON and reads as infinity, which is not
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None


def _encode(
    messages: list[dict[str, str]], parsed: ParsedRow, extra: dict[str, object], layout: RowLayout
) -> tuple[bytes, bytes]:
    """The row as stored, and its messages alone (what makes it the same as another), both UTF-8 JSON."""
    stored: dict[str, object] = {"messages": messages, "line": parsed.place}
    if extra:
        stored["extra"] = extra
    try:
        "".join(parsed.value).encode()
        return _json(stored) + b"\n", _json(messages)
    except UnicodeEncodeError as error:
        found = excerpt(error.object[error.start : error.end])
        raise _RowRefusedError(
            "broken_text",
            f"the row holds half of a surrogate pair ({found}), which is no character",
            field=layout.required[0],
            found=found,
            expected="whole characters",
            mend="write the character itself, or both halves of its pair",
        ) from None


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _listing(names: list[str], limit: int = 20) -> str:
    listed = ", ".join(shown(name) for name in names[:limit])
    return f"{listed}, … ({len(names)})" if len(names) > limit else listed or "none"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

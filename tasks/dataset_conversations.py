"""Conversations of every shape that a file may hold them in: rows become turns, checked to be worth training on."""

from __future__ import annotations

from typing import Any

from configs.datasets import Shape
from tasks.dataset_fields import RowRefusedError, Turn, empty, listed, listing, nearest, optional_text, text, wrong_type
from tasks.dataset_reading import describe, parse_cell
from tasks.dataset_tools import (
    CALL_ROLES,
    RESULT_ROLES,
    calls_of,
    is_results,
    joined,
    linked,
    result_text,
    results_in,
    split_calls,
    tools_in_system,
    tools_of,
)

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = {
    **_SHAREGPT_ROLES,
    **dict.fromkeys(CALL_ROLES, "assistant"),
    **dict.fromkeys(RESULT_ROLES, "tool"),
}
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages hold the thought of an answer."""
_FLAGS = ("weight", "loss", "loss_weight", "train", "trainable")
"""Names under which messages say whether they are trained: Qianfan and OpenAI, ms-swift, xtuner, axolotl."""
_NAMES = {"assistant": "answer", "user": "prompt", "system": "system message", "tool": "tool message"}


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as stored: an answer with its thought, its calls, and the weight 0 where it is not to be trained."""
    return [
        {"role": turn.role, "content": turn.content, **turn.more, **_beside_text(turn.thought, turn.trained)}
        for turn in turns
    ]


def _beside_text(thought: str | None, trained: bool) -> dict[str, Any]:
    """What a stored answer holds beside its text."""
    return {**({} if thought is None else {"reasoning_content": thought}), **({} if trained else {"weight": 0})}


def pair_turns(row: dict[str, object], prompt: str, completion: str) -> list[Turn]:
    """A question and its answer."""
    return [
        Turn("user", text(row[prompt], prompt), prompt),
        Turn("assistant", text(row[completion], completion), completion),
    ]


def alpaca_turns(row: dict[str, object]) -> list[Turn]:
    """System, history, instruction with its input, and the output."""
    return [*alpaca_prompt(row), Turn("assistant", text(row["output"], "output"), "output")]


def alpaca_prompt(row: dict[str, object]) -> list[Turn]:
    """What an Alpaca row asks: system, history, instruction with its input."""
    turns = system_turns(row) + _history_turns(row.get("history"))
    asked = text(row["instruction"], "instruction")
    if (given := optional_text(row, "input")).strip():
        asked = f"{asked}\n\n{given}"
    return [*turns, Turn("user", asked, "instruction")]


def system_turns(row: dict[str, object], field: str = "system") -> list[Turn]:
    """The system message of a row that has a column for it."""
    system = optional_text(row, "system")
    return [Turn("system", system, field)] if system.strip() else []


def _history_turns(history: object) -> list[Turn]:
    history = parse_cell(history)
    if history is None or history == "":
        return []
    if not isinstance(history, list):
        raise wrong_type("history", history, "a list of [question, answer] pairs")
    turns = []
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type(field, pair, "a pair [question, answer]")
        for role, side in (("user", 0), ("assistant", 1)):
            turns.append(Turn(role, text(pair[side], f"{field}[{side}]"), f"{field}[{side}]"))
    return turns


def conversation(value: object, column: str, shape: Shape, dropped: list[str]) -> list[Turn]:
    """The messages of an OpenAI (`messages`) or ShareGPT (`sharegpt`) list; keys not read are added to `dropped`."""
    found = _filled_list(value, column)
    return [_turn(item, f"{column}[{index}]", column, shape, dropped) for index, item in enumerate(found)]


def _filled_list(value: object, column: str) -> list[object]:
    found = listed(value, column, "a list of messages")
    if not found:
        raise RowRefusedError(
            "empty_messages",
            f"the list {column} is empty",
            field=column,
            found="an empty list",
            expected="a user message and an assistant message at least",
            mend="remove the row",
        )
    return found


def _turn(turn: object, field: str, column: str, shape: Shape, dropped: list[str]) -> Turn:
    openai = shape == "messages"
    role_key, text_key = ("role", "content") if openai else ("from", "value")
    if not isinstance(turn, dict):
        raise wrong_type(field, turn, f"an object with {role_key} and {text_key}")
    _refuse_tool_calls(turn, field)
    _require_keys(turn, (role_key, text_key), field)
    role = _role(turn[role_key], f"{field}.{role_key}", _OPENAI_ROLES if openai else _SHAREGPT_ROLES)
    thought = thought_of(turn, field) if role == "assistant" else None
    flags = _FLAGS if role != "assistant" or not thought else (*_FLAGS, *THOUGHT_FIELDS)
    _note_dropped(turn, (role_key, text_key, *flags), column, dropped)
    text_field = f"{field}.{text_key}"
    trained = role != "assistant" or is_trained(turn, field)
    return Turn(role, text(turn[text_key], text_field), text_field, thought, trained)


def _require_keys(turn: dict[str, object], keys: tuple[str, ...], field: str) -> None:
    for key in keys:
        if key not in turn:
            raise RowRefusedError(
                "missing_key",
                f"{field} has no {key!r}; it has: {listing(list(turn))}",
                field=f"{field}.{key}",
                found=listing(list(turn)),
                expected=" and ".join(keys),
                mend=f"give the message a {key!r}",
            )


def thought_of(turn: dict[str, object], field: str) -> str | None:
    """The thought that an answer holds beside its text."""
    for name in THOUGHT_FIELDS:
        if turn.get(name) is not None:
            found = text(turn[name], f"{field}.{name}")
            return found if found.strip() else None
    return None


def is_trained(turn: dict[str, object], field: str) -> bool:
    """Whether an answer is to be trained; several platforms let a row say that it is only to be read.

    Raises RowRefusedError for a weight between: the loss counts an answer, or it does not.
    """
    for name in _FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowRefusedError(
                "weight_between",
                f"{field}.{name} is {describe(value)}, but an answer is trained or it is not",
                field=f"{field}.{name}",
                found=describe(value),
                expected="1 (true), or 0 (false)",
                mend="write 1 for an answer that is trained, 0 for one that is only read",
            )
        if value == 0:
            return False
    return True


def _note_dropped(turn: dict[str, object], used: tuple[str, ...], column: str, dropped: list[str]) -> None:
    for key in turn:
        name = f"{column}[].{key}"
        if key not in used and turn[key] is not None and name not in dropped:
            dropped.append(name)


def _refuse_tool_calls(turn: dict[str, object], field: str) -> None:
    called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if called is not None:
        raise RowRefusedError(
            "tool_calls",
            f"{field} calls a tool, but the first rows of the file do not, so it is read as plain conversations",
            field=f"{field}.{called}",
            found=describe(turn[called]),
            expected="messages of text",
            mend="read all rows as tool_messages (or tool_sharegpt) by --shape, or remove the row",
        )


def _role(value: object, field: str, roles: dict[str, str]) -> str:
    if isinstance(value, str) and value in roles:
        return roles[value]
    known = ", ".join(roles)
    near = nearest(value, list(roles)) if isinstance(value, str) else ""
    raise RowRefusedError(
        "unknown_role",
        f"unknown role: {describe(value)}{near}",
        field=field,
        found=describe(value),
        expected=known,
        mend=f"use one of: {known}",
    )


def require_answered(turns: list[Turn]) -> None:
    """Refuse conversations that hold nothing to learn from, or that chat templates cannot render."""
    last = turns[-1]
    if last.role != "assistant":
        raise RowRefusedError(
            "last_not_assistant",
            f"the last message is of the role {last.role}, so there is no answer to learn",
            field=last.field,
            found=last.role,
            expected="assistant",
            mend="end the conversation with an answer, or cut what follows the last one",
        )
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise RowRefusedError(
            "no_trained_answer",
            "every answer has the weight 0, so there is nothing to learn",
            field=last.field,
            found="the weight 0",
            expected="an answer that is trained",
            mend="remove the row, or give an answer the weight 1",
        )
    require_prompt(turns)


def require_prompt(turns: list[Turn]) -> None:
    """Refuse messages without a user's, with a system message that is not the first, or with an empty one."""
    if not any(turn.role == "user" for turn in turns):
        raise RowRefusedError(
            "no_user_message",
            "no message is of the user, so there is no prompt",
            field=turns[0].field if turns else "prompt",
            found=", ".join(turn.role for turn in turns[:5]) or "no messages",
            expected="a user message before the answer",
            mend="add what was asked",
        )
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise RowRefusedError(
                "system_not_first",
                f"message {index + 1} is of the system; only the first may be",
                field=turn.field,
                found="system",
                expected="user or assistant",
                mend="join the system messages into one at the start",
            )
        if not turn.content.strip() and "tool_calls" not in turn.more:
            raise empty(turn.field, _NAMES[turn.role], turn.content)


# Qianfan and Pangu


def listed_turns(row: dict[str, object]) -> list[dict[str, object]]:
    """The turns of a line that is a list of them; a single object is one turn."""
    turns = row.get("turns")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else [row]


def place(row: dict[str, object], index: int, key: str) -> str:
    """The field of a turn, as `listed_turns` counts them."""
    return f"[{index}].{key}" if "turns" in row else key


def qianfan_turns(row: dict[str, object], dropped: list[str]) -> list[Turn]:
    """Qianfan's dialogue: `prompt` and `response`, a text or the only one of a list of lists; `system` on the first."""
    turns: list[Turn] = []
    for index, turn in enumerate(listed_turns(row)):
        field = place(row, index, "")[:-1] or "the row"
        _require_keys(turn, ("prompt", "response"), field)
        turns += system_turns(turn, place(row, index, "system"))
        asked = place(row, index, "prompt")
        turns.append(Turn("user", text(turn["prompt"], asked), asked))
        answers = qianfan_answers(turn["response"], place(row, index, "response"))
        if len(answers) > 1:
            raise RowRefusedError(
                "several_answers",
                f"{place(row, index, 'response')} holds {len(answers)} answers, and none is marked as the better one",
                field=place(row, index, "response"),
                found=f"{len(answers)} answers",
                expected="one answer, or a score for each",
                mend="keep one answer, or add the list score",
            )
        turns.append(answers[0]._replace(thought=thought_of(turn, field), trained=is_trained(turn, field)))
        if "turns" in row:
            _note_dropped(turn, ("prompt", "response", "system", *_FLAGS, *THOUGHT_FIELDS), "", dropped)
    return turns


def qianfan_answers(value: object, field: str) -> list[Turn]:
    """The answers of a `response`: `"a"`, `["a"]` and `[["a"], ["b"]]` are allowed; the last also as text in a cell."""
    if isinstance(value, str):
        lists = parse_cell(value)
        if not (isinstance(lists, list) and lists and all(isinstance(item, list) for item in lists)):
            return [Turn("assistant", value, field)]
        value = lists
    if not isinstance(value, list) or not value:
        raise wrong_type(field, value, "a list of answers")
    found = []
    for index, answer in enumerate(value):
        single = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        found.append(Turn("assistant", text(single, f"{field}[{index}]"), f"{field}[{index}]"))
    return found


def pangu_turns(row: dict[str, object], dropped: list[str]) -> list[Turn]:
    """Pangu's questions and answers: `context` (a text, or question, answer, …, question) and `target`."""
    turns: list[Turn] = []
    for index, turn in enumerate(listed_turns(row)):
        _require_keys(turn, ("context", "target"), place(row, index, "")[:-1] or "the row")
        turns += pangu_prompt(turn, place(row, index, "system"), place(row, index, "context"))
        target = place(row, index, "target")
        turns.append(Turn("assistant", text(turn["target"], target), target))
        if "turns" in row:
            _note_dropped(turn, ("context", "target", "system"), "", dropped)
    return turns


def pangu_prompt(turn: dict[str, object], system: str, field: str) -> list[Turn]:
    """What a Pangu row asks, with its persona (`system`)."""
    context = turn["context"]
    if not isinstance(context, list):
        return [*system_turns(turn, system), Turn("user", text(context, field), field)]
    said = [text(item, f"{field}[{index}]") for index, item in enumerate(context)]
    if len(said) % 2 == 0:
        raise wrong_type(field, context, "a list of questions and answers that ends with a question")
    roles = ("user", "assistant")
    told = [Turn(roles[index % 2], item, f"{field}[{index}]") for index, item in enumerate(said)]
    return [*system_turns(turn, system), *told]


# Tools


def tool_body(row: dict[str, object], column: str, shape: Shape, dropped: list[str]) -> dict[str, Any]:
    """Messages with tool calls and their results, as OpenAI's interface has them; arguments are objects.

    A `system` column stands before them; the columns `tools` and `functions` describe what may be called.
    """
    tools = tools_of(row)
    found = [*system_turns(row), *tool_turns(_filled_list(row[column], column), column, tools, dropped)]
    if not tools and found[0].role == "system":
        rest, tools = tools_in_system(found[0].content)
        found = [*([found[0]._replace(content=rest)] if rest else []), *found[1:]]
    return tool_conversation(found, tools)


def tool_conversation(turns: list[Turn], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a row of such turns, with its tools where it has some. Raises RowRefusedError."""
    require_answered(turns)
    return {"messages": messages_of(linked(turns)), **({"tools": tools} if tools else {})}


def tool_turns(found: list[object], column: str, tools: list[dict[str, Any]], dropped: list[str]) -> list[Turn]:
    """The turns of a list of messages, OpenAI's, ShareGPT's or ms-swift's; calls are checked against `tools`."""
    turns: list[Turn] = []
    for index, item in enumerate(found):
        turns += _tool_turn(item, f"{column}[{index}]", column, tools, dropped)
    return joined(turns)


def _tool_turn(turn: object, field: str, column: str, tools: list[dict[str, Any]], dropped: list[str]) -> list[Turn]:
    if not isinstance(turn, dict):
        raise wrong_type(field, turn, "an object with role and content, or from and value")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    _require_keys(turn, (role_key,) if called else (role_key, text_key), field)
    role = _role(turn[role_key], f"{field}.{role_key}", _TOOL_ROLES)
    content, place = turn.get(text_key), f"{field}.{text_key}"
    beside = {
        name: turn[name] for name in ("tool_call_id", "name") if role == "tool" and isinstance(turn.get(name), str)
    }
    read = (role_key, text_key, "tool_calls", "function_call", *beside, *_FLAGS, *THOUGHT_FIELDS)
    _note_dropped(turn, read, column, dropped)
    if role == "tool":
        results = results_in(result_text(content, place))
        return [Turn("tool", result, place, more=beside) for result in results]
    if role != "assistant":
        said = text(content, place)
        if role == "user" and is_results(said):
            return [Turn("tool", result, place) for result in results_in(said)]
        return [Turn(role, said, place)]
    if turn[role_key] in CALL_ROLES:
        said, calls = "", calls_of(content, place, tools, dropped)
    elif called is not None:
        said = "" if content is None else text(content, place)
        calls = calls_of(turn[called], f"{field}.{called}", tools, dropped)
    else:
        said, calls = split_calls(text(content, place), place, tools, dropped)
    more = {"tool_calls": calls} if calls else {}
    return [Turn(role, said, place, thought_of(turn, field), is_trained(turn, field), more)]

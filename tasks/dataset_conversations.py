"""Conversations of every shape that a file may hold them in: rows become turns, checked to be worth training on."""

from __future__ import annotations

from typing import Any

from configs.datasets import Shape
from tasks.dataset_fields import RowRefusedError, Turn, empty, listed, listing, nearest, optional_text, text, wrong_type
from tasks.dataset_reading import describe, parse_cell

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = {
    "tool_messages": {**_OPENAI_ROLES, "tool": "tool"},
    "tool_sharegpt": {**_SHAREGPT_ROLES, "function_call": "assistant", "observation": "tool", "tool": "tool"},
}
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages hold the thought of an answer."""
_FLAGS = ("weight", "loss", "loss_weight", "train", "trainable")
"""Names under which messages say whether they are trained: Qianfan and OpenAI, ms-swift, xtuner, axolotl."""
_NAMES = {"assistant": "answer", "user": "prompt", "system": "system message", "tool": "tool message"}


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as stored: an answer with its thought, and with the weight 0 where it is not to be trained."""
    return [{"role": turn.role, "content": turn.content, **_beside_text(turn.thought, turn.trained)} for turn in turns]


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
            mend="remove the row, write the call as text, or read all rows as tool_messages",
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
        if not turn.content.strip():
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

    A `system` column stands before them; the column `tools` describes what may be called.
    """
    openai = shape == "tool_messages"
    messages: list[dict[str, Any]] = messages_of(system_turns(row))
    turns = system_turns(row)
    for index, item in enumerate(_filled_list(row[column], column)):
        field = f"{column}[{index}]"
        messages.append(_tool_message(item, field, column, openai, dropped))
        said = messages[-1]["content"] or describe(messages[-1].get("tool_calls"))
        turns.append(Turn(messages[-1]["role"], said, field))
    require_answered(turns)
    tools = _tool_descriptions(row.get("tools"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _tool_message(turn: object, field: str, column: str, openai: bool, dropped: list[str]) -> dict[str, Any]:
    role_key, text_key = ("role", "content") if openai else ("from", "value")
    if not isinstance(turn, dict):
        raise wrong_type(field, turn, f"an object with {role_key} and {text_key}")
    calls = turn.get("tool_calls") if openai else None
    _require_keys(turn, (role_key,) if calls else (role_key, text_key), field)
    roles = _TOOL_ROLES["tool_messages" if openai else "tool_sharegpt"]
    role = _role(turn[role_key], f"{field}.{role_key}", roles)
    kept = ("tool_calls", "tool_call_id", "name") if openai else ()
    _note_dropped(turn, (role_key, text_key, *kept, *_FLAGS, *THOUGHT_FIELDS), column, dropped)
    beside = _beside_text(thought_of(turn, field), is_trained(turn, field)) if role == "assistant" else {}
    if turn[role_key] == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(turn[text_key], f"{field}.{text_key}"), **beside}
    content = turn.get(text_key)
    told: dict[str, Any] = {"role": role, "content": "", **beside}
    if not calls or content is not None:
        told["content"] = text(content, f"{field}.{text_key}")
    if calls:
        told["tool_calls"] = _calls(calls, f"{field}.tool_calls")
    elif not told["content"].strip():
        raise empty(f"{field}.{text_key}", _NAMES[role], told["content"])
    told |= {name: turn[name] for name in ("tool_call_id", "name") if openai and isinstance(turn.get(name), str)}
    return told


def _calls(value: object, field: str) -> list[dict[str, Any]]:
    value = parse_cell(value)
    calls = value if isinstance(value, list) else [value]
    return [_call(call, f"{field}[{index}]" if len(calls) > 1 else field) for index, call in enumerate(calls)]


def _call(call: object, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong_type(field, call, "a call with a name and its arguments")
    arguments = parse_cell(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise wrong_type(f"{field}.arguments", arguments, "an object of arguments, or one as JSON text")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def _tool_descriptions(value: object) -> list[dict[str, Any]]:
    """The column `tools`: a list of objects with a name each, which may be JSON text."""
    value = parse_cell(value)
    if value is None or value == "" or value == []:
        return []
    if not isinstance(value, list):
        raise wrong_type("tools", value, "a list of tools")
    for index, tool in enumerate(value):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise wrong_type(f"tools[{index}]", tool, "an object with a name")
    return value

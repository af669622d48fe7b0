"""Which answer is better: chosen and rejected ones, and ranked ones with scores."""

from __future__ import annotations

from typing import Any

from tasks.dataset_conversations import (
    alpaca_prompt,
    conversation,
    listed_turns,
    messages_of,
    pangu_prompt,
    place,
    qianfan_answers,
    require_answered,
    require_prompt,
    system_turns,
    tool_turns,
)
from tasks.dataset_fields import RowRefusedError, Turn, empty, listed, messages_cell, number, text, wrong_type
from tasks.dataset_reading import describe
from tasks.dataset_tools import Tool, has_tools, linked, tools_of

PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "messages", "conversations")
RANKED_COLUMNS = ("answers", "responses", "completions")
_MOST_TARGETS = 6


def prompt_column(row: dict[str, object]) -> str | None:
    """The column of the prompt of a preference row; None if it has none."""
    return next((name for name in PROMPT_COLUMNS if name in row), None)


def preference_body(row: dict[str, object], dropped: list[str]) -> dict[str, Any]:
    """Chosen and rejected as texts, messages, or whole conversations that begin alike."""
    column = prompt_column(row)
    tools = tools_of(row) if has_tools(row, "chosen", "rejected", *([column] if column else [])) else None
    sides = [_side(row, name, dropped, tools) for name in ("chosen", "rejected")]
    if all(len(side) > 1 for side in sides) and sides[0][0].role != "assistant":
        prompt, sides = _split(sides)
    elif column is None:
        raise RowRefusedError(
            "missing_column",
            "the row has no prompt, and its answers are no conversations that begin with one",
            field="prompt",
            found=f"the columns {', '.join(list(row)[:20])}",
            expected=f"one of the columns {', '.join(PROMPT_COLUMNS)}",
            mend="add what was asked",
        )
    else:
        prompt = asked_turns(row, column, dropped, tools)
    require_prompt(prompt)
    for side in sides:
        require_answered([*prompt, *side])
    if messages_of(sides[0]) == messages_of(sides[1]):
        raise _equal("chosen, rejected")
    if tools is not None:
        sides = [linked([*prompt, *side])[len(prompt) :] for side in sides]
        prompt = linked(prompt)
    names = ("prompt", "chosen", "rejected")
    body = {name: messages_of(side) for name, side in zip(names, (prompt, *sides), strict=True)}
    return {**body, **({"tools": tools} if tools else {})}


def asked_turns(row: dict[str, object], column: str, dropped: list[str], tools: list[Tool] | None = None) -> list[Turn]:
    """The prompt of a row: a text, an Alpaca instruction with its input, or messages; `tools`: they may call them."""
    value = messages_cell(row[column])
    if column == "instruction":
        return alpaca_prompt(row)
    if isinstance(value, list):
        return [*system_turns(row), *_messages(value, column, dropped, tools)]
    return [*system_turns(row), Turn("user", text(row[column], column), column)]


def _messages(value: list[object], column: str, dropped: list[str], tools: list[Tool] | None) -> list[Turn]:
    if tools is not None:
        return tool_turns(value, column, tools, dropped)
    sharegpt = bool(value) and isinstance(value[0], dict) and "from" in value[0]
    return conversation(value, column, "sharegpt" if sharegpt else "messages", dropped)


def _side(row: dict[str, object], name: str, dropped: list[str], tools: list[Tool] | None) -> list[Turn]:
    value = messages_cell(row[name])
    if isinstance(value, str):
        if not value.strip():
            raise empty(name, "answer", value)
        return [Turn("assistant", value, name)]
    if isinstance(value, dict):
        return _messages([value], name, dropped, tools)
    if not isinstance(value, list):
        raise wrong_type(name, value, "a text, a message or a list of messages")
    return _messages(value, name, dropped, tools)


def _split(sides: list[list[Turn]]) -> tuple[list[Turn], list[list[Turn]]]:
    """Cut two conversations where they begin to differ: the prompt, and what follows it on each side."""
    same = 0
    for one, other in zip(*sides, strict=False):
        if (one.role, one.content, one.more) != (other.role, other.content, other.more):
            break
        same += 1
    if same == min(map(len, sides)):
        raise _equal("chosen, rejected")
    if same == 0:
        raise RowRefusedError(
            "different_prompts",
            "chosen and rejected begin with different messages, so they answer different prompts",
            field="chosen, rejected",
            found="two conversations with nothing in common",
            expected="two conversations that begin with the same messages",
            mend="give both the same prompt, or write it into a column prompt",
        )
    return sides[0][:same], [side[same:] for side in sides]


def _equal(field: str) -> RowRefusedError:
    return RowRefusedError(
        "equal_answers",
        "the answers are the same, so neither is better",
        field=field,
        found="the same answer twice",
        expected="different answers",
        mend="remove the row",
    )


def qianfan_preference_body(row: dict[str, object]) -> dict[str, Any]:
    """Qianfan's DPO rows: turns of `user` and `assistant`, the last with `chosen` and `rejected`."""
    prompt: list[Turn] = []
    turns = listed_turns(row)
    for index, turn in enumerate(turns):
        prompt += system_turns(turn, place(row, index, "system"))
        wanted = ("chosen", "rejected") if index == len(turns) - 1 else ("assistant",)
        asked = "user" if "user" in turn else "prompt"
        for key in (asked, *wanted):
            if key not in turn:
                raise RowRefusedError(
                    "missing_key",
                    f"[{index}] has no {key!r}; it has: {', '.join(list(turn)[:20])}",
                    field=place(row, index, key),
                    found=", ".join(list(turn)[:20]),
                    expected=f"user and {' and '.join(wanted)}",
                    mend=f"give the turn a {key!r}",
                )
        prompt.append(_said(turn, row, index, asked, "user"))
        if wanted == ("assistant",):
            prompt.append(_said(turn, row, index, "assistant", "assistant"))
    last = len(turns) - 1
    sides = [[_said(turns[last], row, last, name, "assistant")] for name in ("chosen", "rejected")]
    for side in sides:
        require_answered([*prompt, *side])
    if sides[0][0].content == sides[1][0].content:
        raise _equal(place(row, last, "rejected"))
    return {"prompt": messages_of(prompt), "chosen": messages_of(sides[0]), "rejected": messages_of(sides[1])}


def _said(turn: dict[str, object], row: dict[str, object], index: int, key: str, role: str) -> Turn:
    field = place(row, index, key)
    return Turn(role, text(turn[key], field), field)


def ranking_body(row: dict[str, object], names: tuple[str, ...], dropped: list[str]) -> dict[str, Any]:
    """A prompt, a list of answers and a list of their scores; `names` are the three columns."""
    prompt, answers, scores = names
    found = [
        Turn("assistant", text(answer, f"{answers}[{index}]"), f"{answers}[{index}]")
        for index, answer in enumerate(listed(row[answers], answers, "a list of answers"))
    ]
    given = listed(row[scores], scores, "a list of numbers")
    return _ranking(asked_turns(row, prompt, dropped), found, given, answers, scores)


def qianfan_ranking_body(row: dict[str, object]) -> dict[str, Any]:
    """Qianfan's ranked rows: `response` holds several answers and `score` a number for each; the last turn counts."""
    prompt: list[Turn] = []
    turns = listed_turns(row)
    for index, turn in enumerate(turns):
        prompt += system_turns(turn, place(row, index, "system"))
        for key in ("prompt", "response", *(["score"] if index == len(turns) - 1 else [])):
            if key not in turn:
                raise wrong_type(place(row, index, key), None, "prompt, response and, in the last turn, score")
        prompt.append(_said(turn, row, index, "prompt", "user"))
        answers = qianfan_answers(turn["response"], place(row, index, "response"))
        if index < len(turns) - 1:
            prompt.append(answers[0])
    last, score = place(row, len(turns) - 1, "response"), place(row, len(turns) - 1, "score")
    return _ranking(prompt, answers, listed(turns[-1]["score"], score, "a list of numbers"), last, score)


def pangu_ranking_body(row: dict[str, object]) -> dict[str, Any]:
    """Pangu's ranked rows: `targets` holds 2 to 6 answers, the best first; the scores count down to 0."""
    targets = listed(row["targets"], "targets", "a list of answers, the best first")
    if len(targets) > _MOST_TARGETS:
        raise wrong_type("targets", targets, f"a list of 2 to {_MOST_TARGETS} answers")
    found = [
        Turn("assistant", text(target, f"targets[{index}]"), f"targets[{index}]")
        for index, target in enumerate(targets)
    ]
    scores: list[object] = list(range(len(found) - 1, -1, -1))
    return _ranking(pangu_prompt(row, "system", "context"), found, scores, "targets", "targets")


def _ranking(
    prompt: list[Turn], answers: list[Turn], scores: list[object], answers_field: str, scores_field: str
) -> dict[str, Any]:
    require_prompt(prompt)
    if len(answers) < 2:
        raise wrong_type(answers_field, [answer.content for answer in answers], "a list of 2 answers or more")
    if len(scores) != len(answers):
        raise RowRefusedError(
            "wrong_number_of_scores",
            f"there are {len(answers)} answers, but the list of scores has {len(scores)}",
            field=scores_field,
            found=describe(scores),
            expected=f"{len(answers)} numbers",
            mend="give each answer a score",
        )
    for answer in answers:
        if not answer.content.strip():
            raise empty(answer.field, "answer", answer.content)
    numbers = [number(score, f"{scores_field}[{index}]") for index, score in enumerate(scores)]
    if len(set(numbers)) == 1:
        raise RowRefusedError(
            "equal_scores",
            "all answers have the same score, so none is better",
            field=scores_field,
            found=f"{numbers[0]:g} for each",
            expected="different scores",
            mend="remove the row",
        )
    return {"prompt": messages_of(prompt), "answers": [answer.content for answer in answers], "scores": numbers}

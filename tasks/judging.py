"""Lets a judge score answers, or compare two models' answers, and reads its replies."""

from __future__ import annotations

import json
import math
import re
import statistics as plain
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.errors import UserError
from configs.judging import ANSWER, ANSWER_B, PLACEHOLDER, Judge, JudgedPairs, JudgedScores, Judgement, placeholders
from configs.scoring import DEFAULT_CONFIDENCE
from tasks.asking import ChatServer, ask_each
from tasks.evaluation import Evaluation
from tasks.statistics import mean_intervals, sign_test

EventHandler = Callable[[list[dict[str, Any]]], None]
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_NAMED_SCORE = re.compile(
    rf"(?:score|rating|grade|评分|得分|打分|分数)(?:\s*\([^()]*\))?[\"'*_\s]*(?:[:：=]|is|为|是)[\"'*_\s]*({_NUMBER})",
    re.IGNORECASE,
)
_BRACKETED = re.compile(rf"\[\[\s*({_NUMBER}|A|B|C|tie)\s*\]\]", re.IGNORECASE)
_ALONE = re.compile(rf"({_NUMBER})\s*(?:/\s*\d+|分)?[.。]?")
_NAMED_WINNER = re.compile(
    r"(?:winner|better|胜者|更好)[\"'*_\s]*(?:[:：=]|is|为|是)[\"'*_\s]*(?:answer\s+|答案\s*)?(A|B|tie|平局?)(?![\w])",
    re.IGNORECASE,
)
_TIES = ("c", "tie", "平", "平局")


def judge_scores(
    judge: Judge, evaluation: Evaluation, on_events: EventHandler = lambda _: None
) -> tuple[list[Judgement], JudgedScores]:
    """The judge's score of every answer, and what they come to. Raises UserError if it replies to none."""
    questions = [fill(judge, _values(row, row["prediction"])) for row in evaluation.predictions]
    replies = _ask(judge, questions, on_events)
    judged = [
        Judgement(row=row["row"], failure=str(reply))
        if isinstance(reply, UserError)
        else Judgement(row=row["row"], score=parse_score(reply, judge.maximum), replies=(reply,))
        for row, reply in zip(evaluation.predictions, replies, strict=True)
    ]
    return judged, _summary(judge, judged)


def judge_pairs(
    judge: Judge, first: Evaluation, other: Evaluation, on_events: EventHandler = lambda _: None
) -> tuple[list[Judgement], JudgedPairs]:
    """Which of two models' answers the judge finds better on each row that both answered.

    Each pair is shown in both orders, since judges favour the answer in one place: it is a win only if both agree.
    """
    answers = {row["row"]: row["prediction"] for row in other.predictions}
    rows = [row for row in first.predictions if row["row"] in answers]
    questions = []
    for row in rows:
        pair = (row["prediction"], answers[row["row"]])
        questions += [fill(judge, _values(row, *pair)), fill(judge, _values(row, *pair[::-1]))]
    replies = _ask(judge, questions, on_events)
    judged = [_pair_judgement(row["row"], replies[2 * index], replies[2 * index + 1]) for index, row in enumerate(rows)]
    return judged, _pairs_summary(judged)


def check_placeholders(judge: Judge, evaluation: Evaluation) -> None:
    """Raise UserError if the prompt names a column that some row does not have."""
    for row in evaluation.predictions:
        known = _values(row, "", "") | {"maximum": ""}
        for name in placeholders(judge.prompt):
            if name not in known:
                raise UserError(
                    f"row {row['row']} of {evaluation.dataset} has nothing to put into the judge's prompt there",
                    field="prompt",
                    value=f"{{{{{name}}}}}",
                    expected=f"one of: {', '.join(known)}",
                )


def fill(judge: Judge, values: Mapping[str, str]) -> str:
    """The prompt with the values in place; what looks like a placeholder inside a value stays as it is."""
    known = {**values, "maximum": str(judge.maximum)}
    return PLACEHOLDER.sub(lambda match: known[match[1]], judge.prompt)


def _values(row: Mapping[str, Any], answer: str, answer_b: str = "") -> dict[str, str]:
    columns = {name: _shown(value) for name, value in row.get("extra", {}).items()}
    own = {"prompt": row["prompt"], "reference": row["reference"], ANSWER: answer, ANSWER_B: answer_b}
    return {**columns, **own}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ask(judge: Judge, questions: Sequence[str], on_events: EventHandler) -> list[str | UserError]:
    server = ChatServer(judge.address, judge.model, "the judge", judge.key_variable, judge.timeout, judge.attempts)
    with server.client() as client:
        replies = ask_each(
            questions,
            lambda text: server.ask(client, [{"role": "user", "content": text}], 0.0, judge.max_tokens).answer,
            judge.at_a_time,
            on_events,
        )
    failures = [reply for reply in replies if isinstance(reply, UserError)]
    if failures and len(failures) == len(replies):
        raise failures[0]
    return replies


def parse_score(reply: str, maximum: int) -> float | None:
    """The score that a reply gives, the last one if several; None if it gives none from 0 to `maximum`."""
    named = _NAMED_SCORE.findall(reply) or [text for text in _BRACKETED.findall(reply) if text[-1:].isdigit()]
    alone = _ALONE.fullmatch(reply.strip())
    found = named[-1] if named else alone[1] if alone else None
    score = float(found) if found is not None else None
    return score if score is not None and 0 <= score <= maximum else None


def parse_winner(reply: str) -> str | None:
    """`A`, `B` or `tie`, by the last word on it; None if the reply says none."""
    named = _NAMED_WINNER.findall(reply) or [text for text in _BRACKETED.findall(reply) if not text[-1:].isdigit()]
    last = (named[-1] if named else reply.strip().strip("*.。")).casefold()
    if last in _TIES:
        return "tie"
    return last.upper() if last in ("a", "b") else None


def _pair_judgement(row: int, straight: str | UserError, swapped: str | UserError) -> Judgement:
    failed = next((reply for reply in (straight, swapped) if isinstance(reply, UserError)), None)
    if isinstance(straight, UserError) or isinstance(swapped, UserError):
        return Judgement(row=row, failure=str(failed))
    one, two = parse_winner(straight), parse_winner(swapped)
    replies = (straight, swapped)
    if one is None or two is None:
        return Judgement(row=row, replies=replies)
    if (one, two) == ("A", "B"):
        return Judgement(row=row, winner="first", replies=replies)
    return Judgement(row=row, winner="other" if (one, two) == ("B", "A") else "tie", replies=replies)


def _summary(judge: Judge, judged: Sequence[Judgement]) -> JudgedScores:
    scores = [each.score for each in judged if each.score is not None]
    counts = {"maximum": judge.maximum, "rows": len(scores), **_missing(judged, len(scores))}
    if not scores:
        return JudgedScores.model_validate(counts)
    return JudgedScores(
        **counts,
        mean=math.fsum(scores) / len(scores),
        interval=mean_intervals({"score": scores}, DEFAULT_CONFIDENCE).get("score"),
        deviation=plain.stdev(scores) if len(scores) > 1 else 0.0,
        median=plain.median(scores),
        distribution={f"{score:g}": count for score, count in sorted(Counter(scores).items())},
    )


def _pairs_summary(judged: Sequence[Judgement]) -> JudgedPairs:
    winners = Counter(each.winner for each in judged if each.winner is not None)
    rows = winners.total()
    split = sum(
        each.winner == "tie" and not any(parse_winner(reply) == "tie" for reply in each.replies) for each in judged
    )
    return JudgedPairs(
        rows=rows,
        **_missing(judged, rows),
        wins=winners["other"],
        losses=winners["first"],
        ties=winners["tie"],
        by_order=split,
        p=sign_test(winners["other"], winners["first"]) if rows else None,
    )


def _missing(judged: Sequence[Judgement], told: int) -> dict[str, int]:
    failed = sum(each.failure is not None for each in judged)
    return {"unparsable": len(judged) - told - failed, "failed": failed}

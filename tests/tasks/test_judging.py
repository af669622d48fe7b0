"""A judge behind a local server: what it is asked, how its replies are read, and what is told of those that are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.judging import COMPARE_PROMPT, Judge, read_judge
from configs.settings import PROJECT_ROOT
from tasks.evaluation import Evaluation
from tasks.judging import check_placeholders, judge_pairs, judge_scores, parse_score, parse_winner
from tests.chat_servers import chat_server
from tests.evaluations import evaluation_of

ROWS = [(f"light {number}", f"on {number}", f"on {number}" if number < 3 else "off") for number in range(5)]


def judge(address: str, **given: Any) -> Judge:
    return Judge.model_validate({"address": address, "model": "wise", "attempts": 1, **given})


def answered(*answers: str) -> Evaluation:
    return evaluation_of([(prompt, wanted, given) for (prompt, wanted, _), given in zip(ROWS, answers, strict=True)])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\nScore: 4", 4),
        ("**Score:** 4.5", 4.5),
        ("Score (0 to 5): 3", 3),
        ("A score of 3 first came to mind, the score is 2", 2),
        ('{"reason": "fine", "score": 5}', 5),
        ("评分：4", 4),
        ("得分是 3 分", 3),
        ("[[2]]", 2),
        (" 5/5. ", 5),
        ("3分", 3),
        ("0", 0),
        ("Score: 6", None),
        ("Score: -1", None),
        ("There are 3 mistakes", None),
        ("", None),
    ],
)
def test_a_score_is_read_where_it_is_named_and_within_its_limits(reply: str, score: float | None) -> None:
    assert parse_score(reply, 5) == score


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Both fine.\nWinner: A", "A"),
        ("winner: **B**", "B"),
        ("Winner: tie", "tie"),
        ("Winner: Answer B", "B"),
        ("胜者：A", "A"),
        ("[[C]]", "tie"),
        ("b", "B"),
        ("Winner: Alice", None),
        ("A is nice, B is nicer", None),
    ],
)
def test_a_winner_is_read_where_it_is_named(reply: str, winner: str | None) -> None:
    assert parse_winner(reply) == winner


def test_every_answer_is_scored_and_what_cannot_be_read_is_counted() -> None:
    def answering(body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        if "light 4" in prompt:
            return "no idea"
        wanted, given = re.findall(r"(?:wanted|given): (.*)", prompt)
        return f"Score: {5 if wanted == given else 1}"

    prompt = "{{prompt}}\nwanted: {{reference}}\ngiven: {{answer}}\nroom {{room}}, 0 to {{ maximum }}"
    evaluation = evaluation_of(ROWS, [{"room": f"r{number} {{{{answer}}}}"} for number in range(5)])
    with chat_server(answering) as server:
        asked = judge(server.address, prompt=prompt)
        check_placeholders(asked, evaluation)
        judgements, found = judge_scores(asked, evaluation)
    # What looks like a placeholder inside of a column is not filled in.
    assert "light 0\nwanted: on 0\ngiven: on 0\nroom r0 {{answer}}, 0 to 5" in server.prompts
    assert {(body["model"], body["temperature"]) for body in server.asked} == {("wise", 0)}
    assert [each.score for each in judgements] == [5, 5, 5, 1, None]
    assert (found.rows, found.unparsable, found.failed) == (4, 1, 0)
    assert (found.mean, found.median, found.distribution) == (4, 5, {"1": 1, "5": 3})
    assert found.interval is not None
    assert found.interval.low < 4 < found.interval.high


def test_rows_that_the_judge_does_not_reply_to_are_counted_and_the_others_kept() -> None:
    with chat_server(lambda body: 400 if "light 1" in body["messages"][-1]["content"] else "Score: 2") as server:
        judgements, found = judge_scores(judge(server.address), answered("", "a", "b", "c", "d"))
    assert (found.rows, found.failed, found.mean) == (4, 1, 2)
    assert "400" in str(judgements[1].failure)


def test_a_busy_judge_is_asked_again_and_one_that_refuses_all_is_told() -> None:
    replies = iter([503, "Score: 1"])
    with chat_server(lambda _: next(replies)) as server:
        _, found = judge_scores(judge(server.address, attempts=2), evaluation_of(ROWS[:1]))
    assert (len(server.asked), found.mean) == (2, 1)
    with chat_server(lambda _: 500) as server, pytest.raises(UserError, match="the judge did not answer"):
        judge_scores(judge(server.address), evaluation_of(ROWS))


def test_the_key_is_sent_from_the_environment_and_stands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-of-the-judge")
    with chat_server(lambda _: "Score: 1") as server:
        asked = judge(server.address, key_variable="MY_KEY")
        judgements, found = judge_scores(asked, evaluation_of(ROWS[:2]))
    assert set(server.keys) == {"Bearer secret-of-the-judge"}
    assert "secret" not in asked.model_dump_json() + found.model_dump_json() + "".join(map(str, judgements))
    monkeypatch.delenv("MY_KEY")
    with chat_server(lambda _: 401) as server, pytest.raises(UserError, match="MY_KEY"):
        judge_scores(judge(server.address, key_variable="MY_KEY"), evaluation_of(ROWS[:1]))
    assert server.keys == [None]


def test_pairs_are_shown_in_both_orders_and_the_order_decides_nothing() -> None:
    def answering(body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        first, second = (re.search(rf"Answer {name}:\n(.*)", prompt) for name in "AB")
        assert first is not None
        assert second is not None
        if "light 3" in prompt:
            return "Winner: A"  # whatever stands first
        if "light 4" in prompt:
            return "Winner: tie"
        return "Winner: A" if first[1] == "right" else "Winner: B"

    first = answered("right", "wrong", "wrong", "wrong", "wrong")
    other = answered("wrong", "right", "right", "right", "right")
    with chat_server(answering) as server:
        judgements, found = judge_pairs(judge(server.address, prompt=COMPARE_PROMPT), first, other)
    assert len(server.asked) == 10
    assert [each.winner for each in judgements] == ["first", "other", "other", "tie", "tie"]
    assert (found.wins, found.losses, found.ties, found.by_order, found.rows) == (2, 1, 2, 1, 5)
    assert found.p == 1


def test_a_judge_of_a_file(tmp_path: Path) -> None:
    shipped = read_judge(PROJECT_ROOT / "configs" / "judges" / "commands.yaml")
    assert not shipped.compares
    file = tmp_path / "judge.yaml"
    file.write_text("address: http://host/v1/chat/completions\nmodel: m\nprompt: compare\n")
    assert read_judge(file).compares
    assert read_judge(file).address == "http://host/v1"
    for wrong, says in (
        ("address: http://user:key@host/v1\nmodel: m\n", "judge.yaml:1: .*"),
        ("address: http://host/v1?api_key=x\nmodel: m\n", "judge.yaml:1: .*"),
        ("address: http://host/v1\nmodel: m\nprompt: grade it\n", "judge.yaml:3: .*"),
        ("address: http://host/v1\nmodel: m\nkey: secret\n", "judge.yaml:3: there is no such field"),
        ("address: http://host/v1\n", "a required parameter is missing"),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=says):
            read_judge(file)


def test_a_placeholder_that_no_column_fills_is_refused() -> None:
    asked = judge("http://host/v1", prompt="{{answer}} {{colour}}")
    with pytest.raises(UserError, match=r"\{\{colour\}\}"):
        check_placeholders(asked, evaluation_of(ROWS))

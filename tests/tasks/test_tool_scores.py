"""Tool calls are scored against the reference: valid, of the right tool, with the right arguments, or unwanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.endpoints import Probe
from configs.errors import UserError
from methods.toolkit.tool_parsing import Parsed, parse_calls
from tasks import evaluation, serving_checks
from tasks.datasets import add_dataset
from tasks.evaluation import read_rows, score_answers
from tasks.inference import Answer
from tasks.tool_messages import received, sent
from tasks.tool_scores import is_valid, tool_figures
from tests.tool_models import TOOL

LIMA = {"name": "weather", "arguments": {"city": "Lima"}}
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
OTHER = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
NO = (0.0, 0.0, 0.0)
NAMES = ("tool_call_valid", "tool_name_accuracy", "tool_arguments_accuracy")


def tagged(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        (tagged(LIMA), [LIMA], (100, 100, 100)),
        (tagged(OSLO), [LIMA], (100, 100, 0)),
        (tagged(OSLO, LIMA), [LIMA, OSLO], (100, 100, 100)),  # in another order
        (tagged(LIMA, LIMA), [LIMA, OSLO], (100, 100, 0)),
        (tagged(LIMA), [LIMA, OSLO], (100, 0, 0)),  # one is missing
        (tagged({"name": "time", "arguments": {}}), [LIMA], (100, 0, 0)),
        (tagged({"name": "wether", "arguments": {"city": "Lima"}}), [LIMA], NO),  # no tool of the row
        (tagged({"name": "weather", "arguments": {"town": "Lima"}}), [LIMA], (0, 100, 0)),  # city is required
        (tagged({"name": "weather", "arguments": {"city": "Lima", "days": "2"}}), [LIMA], (0, 100, 0)),  # text
        (tagged(LIMA)[:-20], [LIMA], NO),  # breaks off
        ("It is sunny.", [LIMA], NO),
        ("", [LIMA], NO),
    ],
)
def test_an_answer_is_scored_where_a_call_is_wanted(
    answer: str, wanted: list[dict[str, Any]], expected: tuple[float, float, float]
) -> None:
    found = tool_figures(parse_calls(answer), wanted, [TOOL, OTHER])
    assert tuple(found[name] for name in NAMES) == expected
    assert found["tool_false_call"] is None


@pytest.mark.parametrize(("answer", "false_call"), [("No.", 0), (tagged(LIMA), 100), ("<tool_call>{", 100)])
def test_a_call_that_nobody_wants_is_a_false_one(answer: str, false_call: float) -> None:
    found = tool_figures(parse_calls(answer), [], [TOOL])
    assert (found["tool_false_call"], found["calls_tool"]) == (false_call, bool(false_call))
    assert {found[name] for name in NAMES} == {None}


def test_rows_without_tools_have_no_figures_of_calls() -> None:
    assert set(tool_figures(Parsed("a"), [], []).values()) == {None}


def test_schemas_that_say_nothing_allow_any_call() -> None:
    assert is_valid(LIMA, [])
    for parameters in ({"type": "nothing"}, {"$ref": "https://example.invalid/schema.json"}):
        assert is_valid(LIMA, [{"function": {"name": "weather", "parameters": parameters}}])


def test_calls_are_scored_beside_the_other_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    call = {"role": "assistant", "tool_calls": [{"function": LIMA}]}
    asked = {"role": "user", "content": "Weather in Lima?"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, call], "tools": [TOOL]},
        {"messages": [asked, call], "tools": [TOOL]},
        {"messages": [asked, {"role": "assistant", "content": "No tool fits."}], "tools": [OTHER]},
        {"messages": [asked, {"role": "assistant", "content": "Hello."}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    version = add_dataset(file)
    marked = Answer(answer="?", tokens=1, hit_limit=False, prompt_token_ids=[], tool_calls=[LIMA], content="")
    told = [
        Answer(answer=text, tokens=1, hit_limit=False, prompt_token_ids=[])
        for text in (tagged(OSLO), tagged(LIMA), "Hello.")
    ]
    outcome = score_answers("m", version, read_rows(version.path, -1), [marked, *told])
    scores = outcome.scores
    assert (scores.rows, scores.tool_rows, scores.calls_expected, scores.calls_made) == (4, 3, 2, 3)
    assert (scores.tool_call_valid, scores.tool_name_accuracy, scores.tool_arguments_accuracy) == (100, 100, 50)
    assert (scores.tool_false_call, scores.accuracy) == (100, 50)  # the right call and the plain answer
    assert {"tool_call_valid", "tool_false_call"} <= outcome.figures.keys()
    assert (
        outcome.predictions[0]["prediction"]
        == outcome.predictions[0]["reference"]
        == ('{"arguments": {"city": "Lima"}, "name": "weather"}')
    )
    assert evaluation._request(read_rows(version.path, 1)[0], tmp_path)["tools"] == [TOOL]


# Servers


def test_arguments_travel_as_text() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": LIMA}]}
    asked = sent([message], [TOOL])
    assert asked["messages"][0]["tool_calls"][0]["function"]["arguments"] == '{"city": "Lima"}'
    assert asked["tools"] == [TOOL]
    assert sent([message], None).keys() == {"messages"}
    assert received(asked["messages"][0]) == {"tool_calls": [LIMA], "broken_calls": 0, "content": ""}
    broken = {"tool_calls": [{"function": {"name": "weather", "arguments": "{"}}]}
    assert received(broken) == {"tool_calls": [], "broken_calls": 1, "content": ""}


@pytest.mark.parametrize("reads_calls", [True, False])
def test_a_served_call_is_compared_whether_the_server_reads_it_or_not(
    monkeypatch: pytest.MonkeyPatch, reads_calls: bool
) -> None:
    asked: list[dict[str, Any]] = []
    city = "Lima"

    def post(_deployment: object, _path: str, content: dict[str, Any], _timeout: float) -> dict[str, Any]:
        asked.append(content)
        arguments = json.dumps({"city": city})
        calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
        read = {"content": "", "tool_calls": calls}
        raw = {"content": tagged({"name": "weather", "arguments": {"city": city}}), "tool_calls": None}
        return {"choices": [{"message": read if reads_calls else raw}], "usage": {"prompt_tokens": 2}}

    class Deployed:
        backend_model, quantization, model, log = "m", None, "m", Path("log")

    monkeypatch.setattr(serving_checks, "post_json", post)
    messages = [{"role": "user", "content": "Weather in Lima?"}]
    probe = Probe(messages=messages, tools=[TOOL], prompt_token_ids=[1, 2], answer=tagged(LIMA), tool_calls=[LIMA])
    proof = serving_checks.verify_answers(Deployed(), [probe], 1.0)  # type: ignore[arg-type]
    assert (proof.prompts_checked, proof.answers_checked) == (1, 1)
    assert asked[0]["tools"] == [TOOL]
    city = "Oslo"
    with pytest.raises(UserError, match="greedy answer is another one"):
        serving_checks.verify_answers(Deployed(), [probe], 1.0)  # type: ignore[arg-type]

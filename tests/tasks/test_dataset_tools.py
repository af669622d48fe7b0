"""Rows with tools, of every published format, become OpenAI's messages and schemas; what is broken names its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.datasets import DatasetVersion, Problem, RequestedShape, Shape
from tasks.dataset_mixing import mix_datasets
from tasks.dataset_tools import linked, read_tools, tools_in_system
from tasks.datasets import add_dataset, check_dataset
from tests.shared_cases import shared_case

LIMA = {"name": "weather", "arguments": {"city": "Lima"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
ASKED = {"role": "user", "content": "Weather in Lima?"}
SAID = {"role": "assistant", "content": "20 degrees."}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))


def call(city: str = "Lima", number: int = 1) -> dict[str, Any]:
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


def calling(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05d}", "name": "weather"}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(version: DatasetVersion) -> list[dict[str, Any]]:
    return [json.loads(line) for line in version.path.read_text(encoding="utf-8").splitlines()]


def stored(path: Path, *rows: object, shape: RequestedShape = "auto") -> dict[str, Any]:
    version = add_dataset(write_lines(path / "data.jsonl", *rows), shape=shape)
    assert version.report.ok
    row: dict[str, Any] = rows_of(version)[0]
    del row["line"]
    return row


TALK = [ASKED, calling(call()), result('{"t": 20}'), SAID]
FORMATS: dict[str, tuple[Shape, dict[str, Any], dict[str, Any]]] = {
    "openai, arguments as text": (
        "tool_messages",
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Lima"}'}}],
                },
                {"role": "tool", "content": '{"t": 20}'},
                SAID,
            ],
            "tools": [TOOL],
        },
        {"messages": TALK, "tools": [TOOL]},
    ),
    "openai functions": (
        "tool_messages",
        {
            "messages": [
                ASKED,
                {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'}},
                {"role": "function", "name": "weather", "content": {"t": 20}},
                SAID,
            ],
            "functions": [TOOL["function"]],
        },
        {"messages": TALK, "tools": [TOOL]},
    ),
    "ms-swift, two calls at once after a text": (
        "tool_messages",
        {
            "tools": json.dumps([TOOL]),
            "messages": [
                ASKED,
                {"role": "assistant", "content": "I look it up."},
                {"role": "tool_call", "content": json.dumps(LIMA)},
                {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"role": "tool_response", "content": "20"},
                {"role": "tool_response", "content": "5"},
                SAID,
            ],
        },
        {
            "messages": [
                ASKED,
                calling(call(), call("Oslo", 2), content="I look it up."),
                result("20"),
                result("5", 2),
                SAID,
            ],
            "tools": [TOOL],
        },
    ),
    "sharegpt": (
        "tool_sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Weather in Lima?"},
                {"from": "function_call", "value": json.dumps(LIMA)},
                {"from": "observation", "value": '{"t": 20}'},
                {"from": "gpt", "value": "20 degrees."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        {"messages": TALK, "tools": [TOOL]},
    ),
    "hermes": (
        "tool_sharegpt",
        {
            "conversations": [
                {"from": "system", "value": f"Call functions. <tools>{json.dumps([TOOL])}</tools> Be brief."},
                {"from": "human", "value": "Weather in Lima?"},
                {"from": "gpt", "value": f"Well.\n<tool_call>\n{json.dumps(LIMA)}\n</tool_call>"},
                {"from": "tool", "value": '<tool_response>\n{"t": 20}\n</tool_response>'},
                {"from": "gpt", "value": "20 degrees."},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "Call functions.\nBe brief."},
                ASKED,
                calling(call(), content="Well."),
                result('{"t": 20}'),
                SAID,
            ],
            "tools": [TOOL],
        },
    ),
    "xlam": (
        "tool_xlam",
        {
            "query": "Weather in Lima?",
            "answers": json.dumps([LIMA]),
            "tools": json.dumps(
                [
                    {
                        "name": "weather",
                        "description": "of a city",
                        "parameters": {
                            "city": {"description": "the city", "type": "str"},
                            "days": {"description": "how many", "type": "int, optional"},
                            "units": {"type": "List[str]", "default": ""},
                        },
                    }
                ]
            ),
        },
        {
            "messages": [ASKED, calling(call())],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "description": "of a city",
                        "parameters": {
                            "type": "object",
                            "properties": {
                                "city": {"type": "string", "description": "the city"},
                                "days": {"type": "integer", "description": "how many"},
                                "units": {"type": "array", "items": {"type": "string"}, "default": ""},
                            },
                            "required": ["city"],
                        },
                    },
                }
            ],
        },
    ),
    "glaive": (
        "tool_glaive",
        {
            "system": "SYSTEM: You may call functions. Use them if required -\n"
            + json.dumps(TOOL["function"], indent=2),
            "chat": "USER: Weather in Lima?\n\n\nASSISTANT: <functioncall> "
            '{"name": "weather", "arguments": \'{"city": "Lima"}\'} <|endoftext|>\n\n\n'
            'FUNCTION RESPONSE: {"t": 20}\n\n\nASSISTANT: 20 degrees. <|endoftext|>\n\n\n',
        },
        {
            "messages": [{"role": "system", "content": "You may call functions. Use them if required"}, *TALK],
            "tools": [TOOL],
        },
    ),
}


@pytest.mark.parametrize(("shape", "row", "expected"), FORMATS.values(), ids=list(FORMATS))
def test_format_is_recognised_and_stored_as_openai_has_it(
    tmp_path: Path, shape: Shape, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = write_lines(tmp_path / "data.jsonl", row)
    assert check_dataset(path).shape == shape
    assert stored(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("glaive", [{"city": "Lima"}]),
        ("hermes", [{}]),
        ("openai_functions", [{"city": "Lima"}]),
        ("parallel_tool_calls", [{"city": "Lima"}]),
        ("swift_agent", [{"city": "Lima"}]),
        ("xlam", [{"city": "Lima"}, {"city": "Oslo"}]),
        ("tools_without_call", []),
    ],
)
def test_reported_file_is_read_whole(name: str, calls: list[dict[str, str]]) -> None:
    version = add_dataset(shared_case("18-function-calling", f"{name}.jsonl"))
    assert version.report.ok
    assert version.kind == "chat_tools"
    rows = rows_of(version)
    made = [each for message in rows[-1]["messages"] for each in message.get("tool_calls", [])]
    assert [each["function"]["arguments"] for each in made] == calls
    assert rows[-1].get("tools") or name == "hermes"


def test_rows_without_a_call_keep_their_tools_among_plain_ones(tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    version = add_dataset(write_lines(tmp_path / "a.jsonl", plain, plain, {"messages": [ASKED, SAID], "tools": [TOOL]}))
    assert version.kind == "chat_tools"
    assert [row.get("tools") for row in rows_of(version)] == [None, None, [TOOL]]


def test_tools_past_the_first_rows_are_not_left_out_in_silence(tmp_path: Path) -> None:
    plain = {"messages": [ASKED, SAID]}
    path = write_lines(tmp_path / "a.jsonl", *[plain] * 30, {**plain, "tools": [TOOL]})
    [problem] = check_dataset(path).problems
    assert (problem.kind, problem.line, problem.field) == ("tools", 31, "tools")
    assert problem.mend == "read all rows as tool_messages by --shape"
    assert check_dataset(path, shape="tool_messages").ok


def test_column_tools_of_another_meaning_stays_a_further_column(tmp_path: Path) -> None:
    assert stored(tmp_path, {"prompt": "a", "completion": "b", "tools": "hammer"})["extra"] == {"tools": "hammer"}


def test_pair_with_tools_is_refused_with_a_way_out(tmp_path: Path) -> None:
    [problem] = check_dataset(
        write_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b", "tools": [TOOL]})
    ).problems
    assert (problem.kind, problem.field) == ("tools", "tools")
    assert problem.mend == "write the row as messages with tools"


PREFERENCE = {
    "prompt": [ASKED],
    "chosen": [{"role": "assistant", "tool_calls": [{"function": LIMA}]}],
    "rejected": [{"role": "assistant", "content": "I do not know."}],
    "tools": [TOOL],
}


def test_preference_keeps_tools_and_calls(tmp_path: Path) -> None:
    assert stored(tmp_path, PREFERENCE) == {
        "prompt": [ASKED],
        "chosen": [calling(call())],
        "rejected": [{"role": "assistant", "content": "I do not know."}],
        "tools": [TOOL],
    }


def test_preference_of_whole_conversations_is_cut_at_the_first_other_call(tmp_path: Path) -> None:
    sides = [
        [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": city}}}]}]
        for city in ("Lima", "Oslo")
    ]
    found = stored(tmp_path, {"chosen": sides[0], "rejected": sides[1], "tools": [TOOL]})
    assert found["prompt"] == [ASKED]
    assert [found["chosen"], found["rejected"]] == [[calling(call())], [calling(call("Oslo"))]]


def messages(*calls: object) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "tool_calls": list(calls)}], "tools": [TOOL]}


BROKEN: dict[str, tuple[object, str, str, str]] = {
    "arguments that break off": (
        messages({"function": {"name": "weather", "arguments": '{"city": "Lim'}}),
        "broken_json",
        "messages[1].tool_calls.arguments",
        "is no JSON: Unterminated string",
    ),
    "arguments that are a list": (
        messages({"function": {"name": "weather", "arguments": "[1]"}}),
        "wrong_type",
        "messages[1].tool_calls.arguments",
        "an object of arguments",
    ),
    "tool that is not described": (
        messages({"function": {"name": "wether", "arguments": {}}}),
        "unknown_tool",
        "messages[1].tool_calls.name",
        "did you mean 'weather'?",
    ),
    "text of a call": (
        {"messages": [ASKED, {"role": "tool_call", "content": "weather(Lima)"}], "tools": [TOOL]},
        "broken_json",
        "messages[1].content",
        "is no JSON",
    ),
    "call in tags": (
        {"messages": [ASKED, {"role": "assistant", "content": "<tool_call>{</tool_call>"}], "tools": [TOOL]},
        "broken_json",
        "messages[1].content",
        "is no JSON",
    ),
    "tools that break off": ({"messages": [ASKED, SAID], "tools": '[{"name": "a"'}, "broken_json", "tools", "no JSON"),
    "tool without a name": (
        {"messages": [ASKED, SAID], "tools": [{"function": {}}]},
        "wrong_type",
        "tools[0]",
        "an object with a name",
    ),
    "xlam without calls": (
        {"query": "a", "answers": "[]", "tools": json.dumps([TOOL])},
        "wrong_type",
        "answers",
        "one call at least",
    ),
    "glaive without speakers": (
        {"system": "SYSTEM: Be brief.", "chat": "Weather?"},
        "wrong_type",
        "chat",
        "name of a speaker",
    ),
    "glaive with broken functions": (
        {"system": 'SYSTEM: call {"name": "weather"', "chat": "USER: a\n\n\nASSISTANT: b"},
        "broken_json",
        "system",
        "functions in system are no JSON",
    ),
}


@pytest.mark.parametrize(("row", "kind", "field", "words"), BROKEN.values(), ids=list(BROKEN))
def test_broken_row_names_its_place(tmp_path: Path, row: object, kind: str, field: str, words: str) -> None:
    shapes: dict[str, RequestedShape] = {"messages": "tool_messages", "query": "tool_xlam", "system": "tool_glaive"}
    assert isinstance(row, dict)
    report = check_dataset(write_lines(tmp_path / "a.jsonl", row), shape=shapes[next(iter(row))])
    problem: Problem = report.problems[0]
    assert (problem.kind, problem.line, problem.field) == (kind, 1, field)
    assert words in problem.message
    assert problem.mend


def test_plain_conversations_are_mixed_with_rows_with_tools(tmp_path: Path) -> None:
    plain = [{"messages": [{"role": "user", "content": f"hi {number}"}, SAID]} for number in range(3)]
    add_dataset(write_lines(tmp_path / "plain.jsonl", *plain))
    add_dataset(write_lines(tmp_path / "calls.jsonl", *[FORMATS["sharegpt"][1]] * 3))
    mixed = mix_datasets({"plain": 1, "calls": 1}, "both")
    assert (mixed.kind, mixed.rows) == ("chat_tools", 6)
    assert sum("tools" in row for row in rows_of(mixed)) == 3


# Null padding of nested columns


def test_nulls_that_parquet_pads_calls_and_schemas_with_are_left_out_and_counted(tmp_path: Path) -> None:
    light = {
        "type": "function",
        "function": {
            "name": "light",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
            },
        },
    }
    rows = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "a", "function": LIMA}]}], "tools": [TOOL]},
        {
            "messages": [
                {"role": "user", "content": "Light on."},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "b", "function": {"name": "light", "arguments": {"room": "hall"}}}],
                },
            ],
            "tools": [light],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    padded = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Lima", "room": None}
    version = add_dataset(tmp_path / "a.parquet")
    found = rows_of(version)
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert arguments == [{"city": "Lima"}, {"room": "hall"}]
    assert [row["tools"] for row in found] == [[TOOL], [light]]
    assert version.report.extra_dropped == {
        "tool_calls.weather.room (null)": 1,
        "tool_calls.light.city (null)": 1,
    }


def test_null_that_is_meant_stays(tmp_path: Path) -> None:
    nullable = {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": ["string", "null"]}, "day": {"type": ["string", "null"]}},
            "required": ["city"],
        },
    }
    given = {"city": None, "day": None}
    row = {**messages({"function": {"name": "weather", "arguments": given}}), "tools": [nullable]}
    as_text = {**messages({"function": {"name": "weather", "arguments": json.dumps(given)}}), "tools": [nullable]}
    found = [
        each["messages"][1]["tool_calls"][0]["function"]["arguments"]
        for each in (stored(tmp_path, row), stored(tmp_path, as_text))
    ]
    assert found == [{"city": None}, given]


# Parts


def test_types_of_python_become_those_of_json() -> None:
    kinds = {
        "a": "List[Union[int, str]]",
        "b": "Optional[float]",
        "c": "Dict[str, int]",
        "d": "Tuple[int, int]",
        "e": "Callable",
        "f": "bool",
    }
    parameters = {name: {"type": kind} for name, kind in kinds.items()}
    [tool] = read_tools([{"name": "x", "parameters": parameters}], "tools")
    assert tool["function"]["parameters"]["properties"] == {
        "a": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
        "b": {"type": "number"},
        "c": {"type": "object"},
        "d": {"type": "array"},
        "e": {},
        "f": {"type": "boolean"},
    }
    assert tool["function"]["parameters"]["required"] == ["a", "c", "d", "e", "f"]
    [tool] = read_tools(
        {"name": "y", "parameters": {"type": "dict", "properties": {"type": {"type": "float"}}}}, "tools"
    )
    assert tool["function"]["parameters"] == {"type": "object", "properties": {"type": {"type": "number"}}}


def test_system_message_without_a_list_of_tools_stays() -> None:
    for text in ("Be brief.", "<tools>none</tools>", "<tools>[]</tools>"):
        assert tools_in_system(text) == (text, [])


def test_results_belong_to_the_calls_before_them() -> None:
    from tasks.dataset_fields import Turn

    def function(name: str, **beside: str) -> dict[str, Any]:
        return {**beside, "type": "function", "function": {"name": name, "arguments": {}}}

    turns = [
        Turn("assistant", "", "", more={"tool_calls": [function("a"), function("b", id="mine")]}),
        Turn("tool", "of b", "", more={"name": "b"}),
        Turn("tool", "of a", ""),
        Turn("tool", "of nobody", ""),
    ]
    found = linked(turns)
    assert [each["id"] for each in found[0].more["tool_calls"]] == ["call00001", "mine"]
    assert [dict(turn.more) for turn in found[1:]] == [
        {"tool_call_id": "mine", "name": "b"},
        {"tool_call_id": "call00001", "name": "a"},
        {},
    ]

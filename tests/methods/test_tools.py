"""Tool calls in training: shown tools, trained calls and answers, nothing else; and how answers are read as calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl import chat_template_utils as published

from methods.toolkit import chat, preference_rows, probing, tokenizing
from methods.toolkit.serve_model import keep_what_templates_show
from methods.toolkit.tool_answers import read_calls, response_template
from methods.toolkit.tool_parsing import Parsed, as_text, calls_of_message, parse_calls
from tests.tool_models import HERMES, TOOL

LIMITS = tokenizing.Limits(8000, None, None, "error")
LLAMA = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>"]
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TALK = [
    {"role": "user", "content": "Weather in Lima?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "weather"},
    {"role": "assistant", "content": "It is sunny."},
]
IN_TAGS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'


def loaded(base: Path, folder: Path, template: str, special: list[str], end: str) -> Any:
    """The tiny tokenizer with another family's template and special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": end, "pad_token": end})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return chat.load_tokenizer(str(folder))[0]


@pytest.fixture
def hermes(tiny_model: Path, tmp_path: Path) -> Any:
    return loaded(tiny_model, tmp_path / "hermes", HERMES, [], "<|im_end|>")


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"line": n, **row}) + "\n" for n, row in enumerate(rows, 1)), encoding="utf-8")
    return path


def trained(tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    return [tokenizer.decode([label for label in row["labels"] if label != chat.IGNORED]) for row in rows]


def test_calls_and_answers_are_trained_and_results_are_read(hermes: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TALK, "tools": [TOOL]})
    [row], report = tokenizing.tokenise_rows(hermes, path, LIMITS, -1)
    assert trained(hermes, [row]) == [f"{IN_TAGS}<|im_end|>It is sunny.<|im_end|>"]
    whole = hermes.decode(row["input_ids"])
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in whole
    assert "<|im_start|>tool\nsunny<|im_end|>" in whole
    assert (report.kept, report.not_renderable) == (1, 0)


@pytest.mark.parametrize(
    ("template", "special", "end", "expected"),
    [
        (published.qwen3_chat_template, [], "<|im_end|>", [f"{IN_TAGS}<|im_end|>", "It is sunny.<|im_end|>"]),
        (
            published.llama3_1_chat_template,
            LLAMA,
            "<|eot_id|>",
            ['{"name": "weather", "parameters": {"city": "Lima"}}<|eot_id|>It is sunny.<|eot_id|>'],
        ),
    ],
    ids=["qwen3", "llama-3.1"],
)
def test_published_templates_write_calls_as_their_family_does(
    tiny_model: Path, tmp_path: Path, template: str, special: list[str], end: str, expected: list[str]
) -> None:
    tokenizer = loaded(tiny_model, tmp_path / "model", template, special, end)
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TALK, "tools": [TOOL]})
    rows, _ = tokenizing.tokenise_rows(tokenizer, path, LIMITS, -1)
    assert trained(tokenizer, rows) == expected
    prompt = chat.render_prompt(tokenizer, TALK[:1], [TOOL])
    assert rows[0]["input_ids"][: len(prompt)] == prompt
    assert response_template(tokenizer) is not None
    said = expected[0].partition(end)[0]
    assert read_calls(tokenizer, said, prompt, [TOOL]).calls == [{"name": "weather", "arguments": {"city": "Lima"}}]
    assert read_calls(tokenizer, "It is sunny.", prompt, [TOOL]) == Parsed("It is sunny.")
    broken = read_calls(tokenizer, said[: said.index("Lima")], prompt, [TOOL])
    assert (broken.calls, broken.broken) == ([], 1)


def test_a_template_without_tools_refuses_the_row_and_trains_the_others(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    plain = [TALK[0], TALK[3]]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": plain}, {"messages": plain, "tools": [TOOL]})
    rows, report = tokenizing.tokenise_rows(tokenizer, path, LIMITS, -1)
    assert (len(rows), report.not_renderable) == (1, 1)
    assert report.notes[0].startswith("line 2: the chat template of this model shows no tools")


def test_pairs_may_differ_in_their_calls(hermes: Any, tmp_path: Path) -> None:
    oslo = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    sides = [[{"role": "assistant", "content": "", "tool_calls": [call]}] for call in (CALL, oslo)]
    row = {"prompt": TALK[:1], "chosen": sides[0], "rejected": sides[1], "tools": [TOOL]}
    path = write_rows(tmp_path / "rows.jsonl", row)
    dataset, report = preference_rows.pair_tokeniser()(hermes, path, LIMITS, -1)
    assert report.kept == 1
    assert hermes.decode(dataset[0]["chosen_ids"]) == f"{IN_TAGS}<|im_end|>"
    assert hermes.decode(dataset[0]["rejected_ids"]) == IN_TAGS.replace("Lima", "Oslo") + "<|im_end|>"
    assert "<tools>" in hermes.decode(dataset[0]["prompt_ids"])
    [talk] = preference_rows.read_conversations(path, -1)
    assert talk.tools == [TOOL]


def test_a_row_with_tools_is_among_the_probes(hermes: Any, tmp_path: Path) -> None:
    plain = {"messages": [TALK[0], TALK[3]]}
    refused = {"messages": [{"role": "nobody", "content": 1}, TALK[3]]}
    path = write_rows(tmp_path / "rows.jsonl", refused, *[plain] * 6, {"messages": TALK[:2], "tools": [TOOL]}, plain)
    probing.write_probes(tmp_path, hermes, tokenizing.read_conversations(path, -1))
    probes = probing.read_probes(tmp_path)
    assert [probe.get("tools") for probe in probes] == [None, None, None, [TOOL]]
    assert probes[3]["prompt_token_ids"] == chat.render_prompt(hermes, TALK[:1], [TOOL])


# Answers


def called(name: str, **arguments: object) -> dict[str, object]:
    return {"name": name, "arguments": arguments}


ANSWERS: dict[str, tuple[str, Parsed]] = {
    "tags": (f"Well.\n{IN_TAGS}\n{IN_TAGS}", Parsed("Well.", [called("weather", city="Lima")] * 2)),
    "tag that breaks off": ('<tool_call>{"name": "a", "argum', Parsed("", [], 1)),
    "arguments that are no object": ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', Parsed("", [], 1)),
    "arguments as text": (
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        Parsed("", [called("a", x=1)]),
    ),
    "glm": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>7</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
        Parsed("", [called("weather", city="7", days=7)]),
    ),
    "qwen 3.5": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nLima\n</parameter>\n</function>\n</tool_call>",
        Parsed("", [called("weather", city="Lima")]),
    ),
    "mistral": ('[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}]', Parsed("", [called("a", x=1)])),
    "mistral, named": ('[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', Parsed("", [called("a", x=1), called("b")])),
    "llama": ('{"name": "a", "parameters": {"x": 1}}', Parsed("", [called("a", x=1)])),
    "llama, python tag": (
        '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}',
        Parsed("", [called("a"), called("b")]),
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.a"
        '<|channel|>commentary json<|message|>{"x": 1}',
        Parsed("", [called("a", x=1)]),
    ),
    "deepseek": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>a\n```json\n{"x":1}\n```<｜tool▁call▁end｜>',
        Parsed("", [called("a", x=1)]),
    ),
    "json that is no call": ('{"name": "Anna", "age": 3}', Parsed('{"name": "Anna", "age": 3}')),
    "text": (" It is sunny. ", Parsed("It is sunny.")),
}


@pytest.mark.parametrize(("text", "expected"), ANSWERS.values(), ids=list(ANSWERS))
def test_answers_are_read_as_the_calls_in_them(text: str, expected: Parsed) -> None:
    assert parse_calls(text, [TOOL]) == expected


def test_calls_as_text_do_not_depend_on_the_order_of_keys() -> None:
    assert as_text(" Well. ", [called("a", y=1, x="ü")]) == 'Well.\n{"arguments": {"x": "ü", "y": 1}, "name": "a"}'
    assert calls_of_message({"tool_calls": [CALL]}) == [called("weather", city="Lima")]
    as_sent = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    assert calls_of_message({"tool_calls": [as_sent]}) == [called("weather", city="Lima")]


def test_the_server_passes_on_what_templates_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cli.serving.utils import BaseHandler, Modality

    read = BaseHandler.get_processor_inputs_from_messages
    monkeypatch.setattr(BaseHandler, "get_processor_inputs_from_messages", staticmethod(read))
    messages = [TALK[0], {**TALK[1], "content": "I look it up."}, *TALK[2:]]
    assert BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM) != messages
    keep_what_templates_show()
    assert BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM) == messages

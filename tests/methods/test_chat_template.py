"""What a training run decides about the chat template becomes part of the template that is saved."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods.contract import Refused
from methods.toolkit import chat, chat_template
from methods.toolkit.chat_template import PLAIN_TEMPLATE, TemplateSettings
from tests.methods.parameter_effects import THINKS

USER = {"role": "user", "content": "switch the light on"}
ANSWER = {"role": "assistant", "content": "it is on"}
THOUGHT = {**ANSWER, "reasoning_content": "the light is off"}
SYSTEM = {"role": "system", "content": "be short"}
OPENS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>' }}{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
)
"""As DeepSeek-R1: every prompt opens a thought, and no answer of the history shows one."""
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + PLAIN_TEMPLATE
)
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + PLAIN_TEMPLATE


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(str(tiny_model))[0]


def prepared(tokenizer: Any, template: str, **settings: Any) -> Any:
    tokenizer.chat_template = template
    chosen = TemplateSettings(**settings)
    chat_template.prepare(tokenizer, chosen)
    tokenizer.thinking = chosen.thinking
    return tokenizer


def saved(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer as any server loads it."""
    from transformers import AutoTokenizer

    chat.save_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def parts(tokenizer: Any, messages: list[chat.Message]) -> tuple[str, str]:
    """The prompt and the trained text of a conversation with one answer."""
    found = chat.render_conversation(tokenizer, messages)
    trained = [label for label in found.labels if label != chat.IGNORED]
    return tokenizer.decode(found.input_ids[: found.prompt_length]), tokenizer.decode(trained)


@pytest.mark.parametrize("template", [THINKS, OPENS])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_a_server_renders_the_prompts_of_training(tokenizer: Any, tmp_path: Path, template: str, thinking: str) -> None:
    ready = prepared(tokenizer, template, thinking=thinking)
    served = saved(ready, tmp_path)
    prompt = served.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert parts(ready, [USER, THOUGHT])[0] == prompt
    assert prompt.endswith("</think>\n\n") == (thinking == "off")


def test_a_thought_is_trained_once_where_the_family_puts_it(tokenizer: Any) -> None:
    assert parts(prepared(tokenizer, THINKS, thinking="on"), [USER, THOUGHT])[1] == (
        "<think>\nthe light is off\n</think>\n\nit is on<|im_end|>"
    )
    prompt, trained = parts(prepared(tokenizer, OPENS, thinking="on"), [USER, THOUGHT])
    assert (prompt.count("<think>"), trained) == (1, "the light is off\n</think>\n\nit is on<|im_end|>")
    plain = parts(prepared(tokenizer, PLAIN_TEMPLATE), [USER, THOUGHT])[1]
    assert plain == "<think>\nthe light is off\n</think>\n\nit is on<|im_end|>"


@pytest.mark.parametrize("template", [THINKS, OPENS, PLAIN_TEMPLATE])
def test_without_thinking_an_answer_is_trained_alone(tokenizer: Any, template: str) -> None:
    assert parts(prepared(tokenizer, template, thinking="off"), [USER, THOUGHT])[1] == "it is on<|im_end|>"


def test_a_thought_inside_the_text_is_the_same_as_one_of_its_own(tokenizer: Any) -> None:
    inside = {**ANSWER, "content": "<think>\nthe light is off\n</think>\n\nit is on"}
    for template in (THINKS, OPENS, PLAIN_TEMPLATE):
        ready = prepared(tokenizer, template)
        assert parts(ready, [USER, inside]) == parts(ready, [USER, THOUGHT])


def job(base: Path, rows: Path, **parameters: Any) -> Any:
    warnings: list[str] = []
    return SimpleNamespace(
        parameters=parameters,
        inputs={"base_model": str(base), "train_rows": str(rows), "date": "2026-03-05"},
        warning=warnings.append,
        warnings=warnings,
    )


def base_with(tiny_model: Path, folder: Path, template: str) -> Path:
    tokenizer = chat.load_tokenizer(str(tiny_model))[0]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("answer", "default"), [(ANSWER, "false"), (THOUGHT, "true")])
def test_auto_follows_the_training_rows(tiny_model: Path, tmp_path: Path, answer: Any, default: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"line": 1, "messages": [USER, answer]}) + "\n")
    ready = chat.training_tokenizer(job(base_with(tiny_model, tmp_path / "base", THINKS), rows, thinking="auto"))
    assert f"set enable_thinking = {default}" in ready.chat_template
    told = chat.training_tokenizer(
        job(tmp_path / "base", rows, thinking="auto", chat_template_kwargs={"enable_thinking": True})
    )
    assert "set enable_thinking = true" in told.chat_template
    assert "set enable_thinking = false" not in told.chat_template


def test_a_system_message_that_the_template_refuses_begins_the_first_question(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = REFUSES_SYSTEM
    assert chat_template.prepare(tokenizer, TemplateSettings()) == [
        "the chat template takes no system message: it becomes the start of the first user message"
    ]
    assert parts(tokenizer, [SYSTEM, USER, ANSWER])[0] == "be short\n\nswitch the light on\n"
    served = saved(tokenizer, tmp_path)
    assert served.apply_chat_template([SYSTEM, USER], tokenize=False) == "be short\n\nswitch the light on\n"
    with pytest.raises(chat.RenderError, match="no system message"):  # there is no question that it could begin
        chat.render_prompt(tokenizer, [SYSTEM, ANSWER, USER])


def test_a_base_model_without_template_gets_its_bos(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat.load_tokenizer(str(tiny_model))[0]
    tokenizer.bos_token, tokenizer.chat_template = "<|im_start|>", None
    begins = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(tmp_path)
    ready, _ = chat.load_tokenizer(str(tmp_path))
    assert parts(ready, [USER, ANSWER]) == ("<|im_start|>switch the light on\n", "it is on<|im_end|>")


def test_training_prints_its_own_date_and_the_saved_template_prints_today(tokenizer: Any, tmp_path: Path) -> None:
    ready = prepared(tokenizer, DATED, today=date(2026, 3, 5))
    assert parts(ready, [USER, ANSWER])[0] == "Today: 05 Mar 2026\nswitch the light on\n"
    assert chat_template.fixed_date(ready) == "2026-03-05"
    served = saved(ready, tmp_path)
    assert served.chat_template == DATED
    assert chat_template.fixed_date(prepared(tokenizer, PLAIN_TEMPLATE, today=date(2026, 3, 5))) is None


def test_a_variable_that_the_template_does_not_read_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Refused, match=r"chat_template_kwargs\.effort: the chat template of this model reads no"):
        prepared(tokenizer, THINKS, variables={"effort": "low"})


@pytest.mark.parametrize("value", ["a \"b\" {{ c }} %}\n'é'", 3, 1.5, True, None, ["x", None], {"k": [1, False]}])
def test_a_variable_is_given_as_it_is(tokenizer: Any, value: Any) -> None:
    template = "{{ level | tojson }}" + PLAIN_TEMPLATE
    ready = prepared(tokenizer, template, variables={"level": value})
    text = ready.apply_chat_template([USER], tokenize=False)
    assert json.JSONDecoder().raw_decode(text)[0] == value


def test_a_template_that_shows_no_tools_refuses_rows_with_tools(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    with pytest.raises(chat.RenderError, match="shows no tools"):
        chat.render_conversation(tokenizer, [USER, ANSWER], tools=tools)

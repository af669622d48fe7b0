"""Conversations as tokens: what is trained, what is not, and where an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from methods.contract import Refused
from methods.toolkit import chat
from methods.toolkit.chat_template import PLAIN_TEMPLATE

USER = {"role": "user", "content": "switch the light on"}
ANSWER = {"role": "assistant", "content": "it is on"}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(str(tiny_model))[0]


def trained_text(tokenizer: Any, rendered: chat.Rendered) -> str:
    return str(tokenizer.decode([label for label in rendered.labels if label != chat.IGNORED]))


def test_only_the_answer_and_its_end_token_are_trained(tokenizer: Any) -> None:
    rendered = chat.render_conversation(tokenizer, [{"role": "system", "content": "be short"}, USER, ANSWER])
    prompt = chat.render_prompt(tokenizer, [{"role": "system", "content": "be short"}, USER])
    assert rendered.prompt_length == len(prompt)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.labels[: len(prompt)] == [chat.IGNORED] * len(prompt)
    assert rendered.labels[len(prompt) :] == rendered.input_ids[len(prompt) :]
    assert trained_text(tokenizer, rendered) == "it is on<|im_end|>"
    assert rendered.supervised == len(rendered.input_ids) - len(prompt)


def test_every_answer_of_a_conversation_is_trained(tokenizer: Any) -> None:
    messages = [USER, ANSWER, {"role": "user", "content": "and off"}, {"role": "assistant", "content": "off"}]
    rendered = chat.render_conversation(tokenizer, messages)
    assert trained_text(tokenizer, rendered) == "it is on<|im_end|>off<|im_end|>"
    assert rendered.prompt_length == len(chat.render_prompt(tokenizer, messages[:3]))
    assert rendered.input_ids[: rendered.prompt_length] == chat.render_prompt(tokenizer, messages[:3])


def test_what_the_template_writes_after_the_end_token_is_left_out(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    rendered = chat.render_conversation(tokenizer, [USER, ANSWER])
    assert whole[-1] != tokenizer.eos_token_id  # a newline
    assert rendered.input_ids == whole[:-1]


def test_an_end_token_is_added_where_the_template_writes_none(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    rendered = chat.render_conversation(tokenizer, [USER, ANSWER])
    assert rendered.labels[-1] == tokenizer.eos_token_id
    assert rendered.labels.count(tokenizer.eos_token_id) == 1


def test_a_template_that_rewrites_the_answer_is_tokenised_apart(tokenizer: Any) -> None:
    # As reasoning models do: the generation prompt opens a block that a finished turn does not show.
    tokenizer.chat_template = PLAIN_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
    rendered = chat.render_conversation(tokenizer, [USER, {**ANSWER, "reasoning_content": "look"}])
    whole = "switch the light on\n<think>\nlook\n</think>\n\nit is on<|im_end|>"
    assert tokenizer.decode(rendered.input_ids) == whole
    assert trained_text(tokenizer, rendered) == "look\n</think>\n\nit is on<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_answers(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN_TEMPLATE
    with pytest.raises(ValueError, match="rewrites the turns before message 4"):
        chat.render_conversation(tokenizer, [USER, ANSWER, USER, ANSWER])


def test_a_model_without_template_or_pad_token_is_made_ready_and_that_is_said(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))[0]
    tokenizer.pad_token = tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    ready, added = chat.load_tokenizer(str(tmp_path))
    assert ready.pad_token == "<|im_end|>"
    assert [text.split(":")[0] for text in added] == [
        "the tokenizer has no pad token",
        "the model has no chat template",
    ]
    assert trained_text(ready, chat.render_conversation(ready, [USER, ANSWER])) == "it is on<|im_end|>"
    assert chat.load_tokenizer(str(tiny_model))[1] == []


def test_a_model_that_could_never_stop_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))[0]
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="eos_token"):
        chat.load_tokenizer(str(tmp_path))

"""Chat templates rewritten for Go: the templates of real families, rendered by transformers' own engine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from configs.errors import UserError
from methods.toolkit.tiny_models import CHATML
from tasks.go_templates import CONVERSATIONS, derive, verify
from tests.go_template import execute

# As the families write them, cut to what conversations without tools need.
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% endfor %}"
)
BRACES = (
    "{% for message in messages %}"
    "{{ '{{ ' + message['role'] + ' \"}}\\\\ ' + message['content'] + '。😀\t' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{ \"assistant\" }}' }}{% endif %}"
)
# The newest question in another form than the earlier ones, which nothing can do that writes message by message.
THINKING = (
    "{% for message in messages %}{% if loop.last %}{{ 'NOW ' }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TWICE = "{% for message in messages %}{{ message['content'] + message['content'] }}{% endfor %}"
LENGTHS = "{{ messages | length }}" + CHATML

EXPRESSIBLE = {"chatml": CHATML, "smollm": SMOLLM, "mistral": MISTRAL, "braces": BRACES}
CHAT = [
    {"role": "system", "content": "Be brief: 简短."},
    {"role": "user", "content": 'a "quoted" {{ question }}'},
    {"role": "assistant", "content": "an\n\nanswer\\"},
    {"role": "user", "content": "and now?"},
]


def rendered(template: str, messages: list[dict[str, str]]) -> str | None:
    """What the template makes of a conversation; None where it refuses it."""
    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
    except TemplateError:
        return None
    return str(texts[0])


def pieces_of(template: str, *, bos: str | None = "<s>", adds_bos: bool = False) -> Any:
    return derive([rendered(template, messages) for messages in CONVERSATIONS], bos, adds_bos)


def as_ollama_does(template: str, messages: list[dict[str, str]], system: str | None) -> str:
    """Ollama puts the model's system message in front of a conversation that has none, and executes the template."""
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return execute(template, {"Messages": [{"Role": each["role"], "Content": each["content"]} for each in messages]})


@pytest.mark.parametrize("name", EXPRESSIBLE)
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2], CHAT[3:]], ids=["all", "plain", "first", "one"])
def test_the_go_template_writes_what_the_models_own_writes(name: str, messages: list[dict[str, str]]) -> None:
    pieces, expected = pieces_of(EXPRESSIBLE[name]), rendered(EXPRESSIBLE[name], messages)
    if expected is None:
        assert pieces.before_system is None
        return
    assert as_ollama_does(pieces.go(), messages, pieces.system) == expected
    assert pieces.compose(messages) == expected


def test_the_default_system_message_is_found() -> None:
    assert pieces_of(SMOLLM).system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert pieces_of(CHATML).system is None


def test_a_first_token_that_the_server_adds_is_left_out_of_the_template() -> None:
    assert pieces_of(MISTRAL).first == "<s>[INST] "
    assert pieces_of(MISTRAL, adds_bos=True).first == "[INST] "


@pytest.mark.parametrize(
    ("template", "reason"),
    [(THINKING, "a Go template would write"), (TWICE, "each message once"), (LENGTHS, "a Go template would write")],
    ids=["the last message apart", "twice", "lengths"],
)
def test_a_template_that_go_cannot_write_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        pieces_of(template)
    assert "llama.cpp" in str(refused.value)


def test_a_first_token_that_the_server_adds_against_the_template_is_refused() -> None:
    with pytest.raises(UserError, match="first token"):
        pieces_of(CHATML, adds_bos=True)


def test_a_template_that_refuses_plain_conversations_is_refused() -> None:
    with pytest.raises(UserError, match="refuses a plain conversation"):
        pieces_of("{{ raise_exception('never') }}")


def test_a_trained_prompt_that_comes_out_otherwise_is_told_with_the_place() -> None:
    pieces = pieces_of(CHATML)
    with pytest.raises(UserError, match=r"light ON"):
        verify(pieces, [{"role": "user", "content": "light on"}], "<|im_start|>user\nlight ON<|im_end|>\n")


@pytest.mark.targets
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; Debian's package is golang-go")
def test_go_itself_writes_the_same(tmp_path: Path) -> None:
    cases = []
    for template in EXPRESSIBLE.values():
        pieces = pieces_of(template)
        for messages in (CHAT, CHAT[1:], CHAT[3:]):
            expected = rendered(template, messages)
            if expected is not None:
                if pieces.system is not None and messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": pieces.system}, *messages]
                cases.append({"template": pieces.go(), "messages": messages, "expected": expected})
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    (tmp_path / "main.go").write_text(_GO, encoding="utf-8")
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert json.loads(done.stdout) == [case["expected"] for case in cases]
    assert len(cases) > 8


_GO = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type message struct { Role, Content string }

func main() {
	var cases []struct { Template string; Messages []message }
	text, _ := os.ReadFile("cases.json")
	if err := json.Unmarshal(text, &cases); err != nil { panic(err) }
	written := []string{}
	for _, each := range cases {
		parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
		if err != nil { panic(err) }
		var out strings.Builder
		if err := parsed.Execute(&out, map[string]any{"Messages": each.Messages}); err != nil { panic(err) }
		written = append(written, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""

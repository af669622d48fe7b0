"""Chat templates as Go templates, rendered here by the little of Go's template language that they use."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from configs.errors import UserError
from tasks.go_templates import CONVERSATIONS, derive
from tests.tiny_models import CHATML

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou {{ '{{' }} help.<|im_end|>\n{% endif %}" + CHATML
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} \"quoted\" \\ {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}\n{% endfor %}"
NUMBERS = "{% for m in messages %}{{ loop.index }}:{{ m['content'] }}\n{% endfor %}"


def jinja(template: str, messages: list[dict[str, str]]) -> str | None:
    from jinja2 import Environment

    def refuse(text: str) -> None:
        raise ValueError(text)

    made = Environment().from_string(template)  # noqa: S701 - text, not HTML
    try:
        return made.render(messages=messages, add_generation_prompt=True, bos_token="<s>", raise_exception=refuse)
    except ValueError:
        return None


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Render a Go template made of text, strings, `.Role`, `.Content`, one variable, `range`, `if eq` and `else`."""
    parts = re.split(r"(\{\{ .*? \}\}(?=\{\{|[^\"]|$))", template)
    tokens = [part for part in parts if part]
    program, rest = _block(tokens, 0)
    assert rest == len(tokens)
    out: list[str] = []
    _run(program, {"$last": ""}, messages, None, out)
    return "".join(out)


def _block(tokens: list[str], at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while at < len(tokens):
        word = tokens[at].removeprefix("{{ ").removesuffix(" }}")
        if word == "end" or word.startswith("else"):
            return found, at
        if word.startswith(("if ", "range ")):
            branches, at = [], at
            head = word
            while True:
                body, at = _block(tokens, at + 1)
                branches.append((head, body))
                head = tokens[at].removeprefix("{{ ").removesuffix(" }}")
                if head == "end":
                    break
                head = head.removeprefix("else").strip() or "else"
            found.append(branches)
        else:
            found.append(word)
        at += 1
    return found, at


def _run(program: list[Any], names: dict[str, str], messages: Any, message: Any, out: list[str]) -> None:
    for item in program:
        if isinstance(item, list):
            _branch(item, names, messages, message, out)
        elif item == ".Content":
            out.append(message["content"])
        elif item.startswith('"'):
            out.append(json.loads(item))
        elif match := re.fullmatch(r'(\$last) :?= "(\w*)"', item):
            names[match[1]] = match[2]
        else:
            raise AssertionError(f"not understood: {item}")


def _branch(branches: list[Any], names: dict[str, str], messages: Any, message: Any, out: list[str]) -> None:
    for head, body in branches:
        if head == "range .Messages":
            for each in messages:
                _run(body, names, messages, each, out)
            return
        match = re.fullmatch(r'if eq (\$last|\.Role) "(\w*)"', head)
        assert match or head == "else", head
        if match is None or (names["$last"] if match[1] == "$last" else message["role"]) == match[2]:
            _run(body, names, messages, message, out)
            return


@pytest.mark.parametrize(
    ("template", "bos", "adds_bos"),
    [(CHATML, None, False), (LLAMA, "<s>", True), (LLAMA, "<s>", False), (DEFAULT_SYSTEM, None, False),
     (NO_SYSTEM, None, False)],
)  # fmt: skip
def test_the_go_template_writes_what_the_models_own_does(template: str, bos: str | None, adds_bos: bool) -> None:
    texts = [jinja(template, messages) for messages in CONVERSATIONS]
    pieces = derive(texts, bos, adds_bos)
    others = [
        [{"role": "user", "content": 'braces {{ .Content }} and "quotes" \\ \n'}],
        [{"role": "user", "content": "一"}, {"role": "assistant", "content": "😀"}, {"role": "user", "content": "三"}],
    ]
    for messages in [*CONVERSATIONS, *others]:
        wanted = jinja(template, messages)
        if wanted is None:
            continue
        given = messages
        if pieces.system is not None and messages[0]["role"] != "system":
            given = [{"role": "system", "content": pieces.system}, *messages]  # as Ollama puts `system` in front
        assert ("<s>" if adds_bos else "") + go(pieces.go(), given) == wanted


def test_a_system_message_of_the_template_itself_is_found() -> None:
    pieces = derive([jinja(DEFAULT_SYSTEM, messages) for messages in CONVERSATIONS], None, False)
    assert pieces.system == "You {{ help."
    without = derive([jinja(NO_SYSTEM, messages) for messages in CONVERSATIONS], None, False)
    assert without.before_system is None


@pytest.mark.parametrize("template", [TRIMS, NUMBERS])
def test_what_go_cannot_write_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="cannot be written as one of Ollama's"):
        derive([jinja(template, messages) for messages in CONVERSATIONS], None, False)

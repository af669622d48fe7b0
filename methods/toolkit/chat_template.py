"""Prepares the chat template of a tokenizer: what a train decides about it becomes part of the template itself.

A saved model then renders the same prompts on every server, whatever the server passes to the template. The decisions:
thoughts on or off, values of the template's own variables, a system message where the template refuses one, and the
beginning-of-sequence token of the plain template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from methods.contract import Refused
from methods.toolkit import thoughts

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
"""For base models that bring no template of their own: it is saved with the model, so serving renders the same."""

BOS = "{{ bos_token }}"

Thinking = Literal["auto", "on", "off"]
Place = Literal["field", "prompt", "text"]

_SWITCHES = ("enable_thinking", "thinking")
_CLOSES_THOUGHT = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '\n</think>\n\n' }}{% endif %}"
)
_JOINS_SYSTEM = (
    "{%- if messages and messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user'"
    " and messages[0]['content'] is string and messages[1]['content'] is string %}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\n\n' + messages[1]['content']}]"
    " + messages[2:] %}{%- endif %}"
)
_DATED = re.compile(r"\{#- training date (\S+) -#\}.*?\{#- end of date -#\}", re.DOTALL)
_DIRECTIVE = re.compile(r"%-?[A-Za-z]")
_USER = {"role": "user", "content": "Question"}


@dataclass(frozen=True)
class TemplateSettings:
    """What a job decides about the template.

    `thinking`: `on` and `off` say whether answers have thoughts, `auto` leaves it to the template. `variables` are
    values of the template's own variables. `today` is the date that a template prints; None: the day of rendering.
    """

    thinking: Thinking = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date | None = None

    @classmethod
    def of_job(cls, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> TemplateSettings:
        """The settings that a job holds."""
        given = inputs.get("date")
        return cls(
            thinking=parameters.get("thinking") or "auto",
            variables=parameters.get("chat_template_kwargs") or {},
            today=date.fromisoformat(given) if given else None,
        )


@dataclass(frozen=True)
class Style:
    """How a template treats thoughts.

    `switch` is the variable that turns them on and off, None without one. `place`: the template writes the thought of
    the last answer itself (`field`), the prompt opens it (`prompt`), or it is part of the answer's text (`text`).
    """

    switch: str | None
    place: Place


def prepare(tokenizer: Any, settings: TemplateSettings) -> list[str]:
    """Make the template of the tokenizer decide what the settings decide.

    Returns one sentence for each thing that is not the published template's. Raises Refused for variables that the
    template does not read.
    """
    changed = []
    strip_date(tokenizer)
    if tokenizer.chat_template is None:
        _change(tokenizer, lambda _: (BOS if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE)
        changed.append("the model has no chat template: Tuneline's plain one is used and saved with the model")
    _refuse_unknown(tokenizer, settings.variables)
    if _loses_system(tokenizer):
        _put_before(tokenizer, _JOINS_SYSTEM)
        changed.append("the chat template takes no system message: it becomes the start of the first user message")
    if _lacks_switch(tokenizer):
        _change(tokenizer, lambda template: template.removesuffix("\n") + _CLOSES_THOUGHT)
    variables = dict(settings.variables)
    style = find_style(tokenizer)
    if settings.thinking != "auto" and style.switch is not None:
        variables.setdefault(style.switch, settings.thinking == "on")
    if variables:
        _put_before(tokenizer, "".join(_sets(name, value) for name, value in variables.items()))
    if settings.today is not None:
        fix_date(tokenizer, settings.today)
    return changed


def set_thinking(tokenizer: Any, on: bool) -> None:
    """Make thoughts the template's default, or leave them out by default."""
    style = find_style(tokenizer)
    if style.switch is not None:
        _put_before(tokenizer, _sets(style.switch, on))


def find_style(tokenizer: Any) -> Style:
    """How the template of the tokenizer treats thoughts."""
    style: Style = found_once(tokenizer, "style", lambda each: Style(_switch(each), _place(each)))
    return style


def found_once(tokenizer: Any, what: str, find: Callable[[Any], Any]) -> Any:
    """What is found of a tokenizer's template by rendering, once for each template that the tokenizer has."""
    found: dict[str, Any]
    template, found = getattr(tokenizer, "found_by_rendering", (None, {}))
    if template != tokenizer.chat_template:
        found = {}
        tokenizer.found_by_rendering = (tokenizer.chat_template, found)
    if what not in found:
        found[what] = find(tokenizer)
    return found[what]


def strip_date(tokenizer: Any) -> None:
    """Let the template print the day of rendering again."""
    if tokenizer.chat_template is not None:
        _change(tokenizer, lambda template: _DATED.sub("", template))


def fixed_date(tokenizer: Any) -> str | None:
    """The date that the template prints for as long as it is not saved (ISO 8601), None for a template without one."""
    return next((mark[1] for template in _templates(tokenizer) if (mark := _DATED.match(template))), None)


def fix_date(tokenizer: Any, today: date) -> None:
    """Have the template print `today` for as long as it is not saved.

    The library's `strftime_now` reads the clock: a training run resumed on another day would see other prompts.
    """

    def fixed(template: str) -> str:
        if "strftime_now" not in template:
            return template
        parts = sorted(set(_DIRECTIVE.findall(template)))
        replaced = "".join(f" | replace({json.dumps(part)}, {json.dumps(today.strftime(part))})" for part in parts)
        macro = "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}"
        return f"{{#- training date {today} -#}}{macro}{{#- end of date -#}}{template}"

    _change(tokenizer, fixed)


def _templates(tokenizer: Any) -> list[str]:
    given = tokenizer.chat_template
    return list(given.values()) if isinstance(given, dict) else [given] if given else []


def _change(tokenizer: Any, change: Callable[[str], str]) -> None:
    """Change the template, or each one of a tokenizer that has several by name."""
    given = tokenizer.chat_template
    if isinstance(given, dict):
        tokenizer.chat_template = {name: change(template) for name, template in given.items()}
    else:
        tokenizer.chat_template = change(given or "")


def _put_before(tokenizer: Any, statements: str) -> None:
    # The environment drops the first newline behind a block: one that the template begins with stays with another.
    _change(tokenizer, lambda template: statements + ("\n" if template.startswith("\n") else "") + template)


def _sets(name: str, value: Any) -> str:
    """The statements that give a variable its value where the caller gives none."""
    return f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"


def _literal(value: Any) -> str:
    """A JSON value in the language of templates, where null is none."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its bos token, as the model was pre-trained."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _refuse_unknown(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    for name in variables:
        if not any(re.search(rf"\b{re.escape(name)}\b", template) for template in _templates(tokenizer)):
            raise Refused(
                f"chat_template_kwargs.{name}: the chat template of this model reads no variable of this name. "
                "Remove it, or correct its spelling."
            )


def _try(tokenizer: Any, messages: list[dict[str, Any]], **named: Any) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **named)
    except Exception:  # a template is a program of somebody else: any error means that it refuses
        return None
    return text


def _loses_system(tokenizer: Any) -> bool:
    """Whether the template refuses a system message, or leaves it out, where it takes the user's."""
    alone = _try(tokenizer, [_USER], add_generation_prompt=True)
    both = _try(tokenizer, [{"role": "system", "content": "Rules"}, _USER], add_generation_prompt=True)
    return alone is not None and (both is None or "Rules" not in both)


def _prompt(tokenizer: Any, **named: Any) -> str | None:
    return _try(tokenizer, [_USER], add_generation_prompt=True, **named)


def _switch(tokenizer: Any) -> str | None:
    for name in _SWITCHES:
        if any(name in template for template in _templates(tokenizer)):
            on, off = (_prompt(tokenizer, **{name: value}) for value in (True, False))
            if on != off:
                return name
    return None


def _lacks_switch(tokenizer: Any) -> bool:
    """Whether every prompt opens a thought, with no variable to leave it out."""
    return _switch(tokenizer) is None and thoughts.leaves_open(_prompt(tokenizer) or "")


def _place(tokenizer: Any) -> Place:
    answer = {"role": "assistant", "content": "Answer", thoughts.FIELDS[0]: "Because"}
    if "Because" in (_try(tokenizer, [_USER, answer]) or ""):
        return "field"
    opened = thoughts.leaves_open(_prompt(tokenizer, **dict.fromkeys(_SWITCHES, True)) or "")
    return "prompt" if opened else "text"

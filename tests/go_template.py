"""The few actions of Go's text/template that our templates are made of, executed as Go's documentation says.

Written apart from `tasks.go_templates`, so that a test of one is none of itself. `test_go_templates.py` also runs Go,
where there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r'\{\{((?:[^"}]|"(?:\\.|[^"\\])*"|\}(?!\}))*)\}\}')
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|[^\s"]+')


def execute(template: str, data: dict[str, Any]) -> str:
    """What the template writes for the data. Raises ValueError for anything else than the actions we know."""
    tokens = list(_tokens(template))
    tree, rest = _parse(tokens, 0, ())
    if rest != len(tokens):
        raise ValueError(f"unexpected {tokens[rest]}")
    return "".join(_write(tree, data, {}))


def _tokens(template: str) -> Iterator[tuple[str, list[str]]]:
    end = 0
    for found in _ACTION.finditer(template):
        if found.start() > end:
            yield "text", [template[end : found.start()]]
        yield "action", _WORD.findall(found[1])
        end = found.end()
    if end < len(template):
        if "{{" in template[end:]:
            raise ValueError(f"unclosed action: {template[end:]}")
        yield "text", [template[end:]]


def _parse(tokens: list[tuple[str, list[str]]], at: int, until: tuple[str, ...]) -> tuple[list[Any], int]:
    nodes: list[Any] = []
    while at < len(tokens):
        kind, words = tokens[at]
        if kind == "action" and words[0] in until:
            return nodes, at
        at += 1
        if kind == "text":
            nodes.append(("text", words[0]))
        elif words[0] == "range":
            body, at = _parse(tokens, at, ("end",))
            nodes.append(("range", words[1:], body))
            at += 1
        elif words[0] == "if":
            node, at = _branches(tokens, at, words[1:])
            nodes.append(node)
        elif words[0].startswith("$") and len(words) == 3 and words[1] in (":=", "="):
            nodes.append(("set", words[0], words[1], words[2]))
        elif len(words) == 1:
            nodes.append(("value", words[0]))
        else:
            raise ValueError(f"unknown action {words}")
    if until:
        raise ValueError("unexpected end of the template")
    return nodes, at


def _branches(tokens: list[tuple[str, list[str]]], at: int, condition: list[str]) -> tuple[Any, int]:
    body, at = _parse(tokens, at, ("else", "end"))
    words = tokens[at][1]
    at += 1
    if words == ["end"]:
        return ("if", condition, body, []), at
    if len(words) > 1:  # else if: one end closes the chain
        nested, at = _branches(tokens, at, words[2:])
        return ("if", condition, body, [nested]), at
    other, at = _parse(tokens, at, ("end",))
    return ("if", condition, body, other), at + 1


def _write(nodes: list[Any], dot: Any, variables: dict[str, str]) -> Iterator[str]:
    for node in nodes:
        kind = node[0]
        if kind == "text":
            yield node[1]
        elif kind == "value":
            yield str(_value(node[1], dot, variables))
        elif kind == "set":
            if (node[1] in variables) == (node[2] == ":="):
                raise ValueError(f"{node[1]} {node[2]}: declared twice, or never")
            variables[node[1]] = _value(node[3], dot, variables)
        elif kind == "range":
            for item in _value(node[1][0], dot, variables):
                yield from _write(node[2], item, variables)
        else:
            word, left, right = node[1]
            if word != "eq":
                raise ValueError(f"unknown condition {node[1]}")
            same = _value(left, dot, variables) == _value(right, dot, variables)
            yield from _write(node[2] if same else node[3], dot, variables)


def _value(word: str, dot: Any, variables: dict[str, str]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    return variables[word] if word.startswith("$") else dot[word.removeprefix(".")]

"""One field of a row: read as what it must be, or refused with its place, what was found and how to mend it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from configs.datasets import Problem
from tasks.dataset_reading import describe, parse_cell, shown

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Turn(NamedTuple):
    """A message and where in the row it came from; `more` holds its `tool_calls`, or `tool_call_id` and `name`."""

    role: str
    content: str
    field: str
    thought: str | None = None
    trained: bool = True
    more: Mapping[str, Any] = _NOTHING


class RowRefusedError(Exception):
    """Why one row cannot be used; its place in the file is added by whoever knows it."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        field: str,
        found: str,
        expected: str,
        mend: str,
    ) -> None:
        self.problem = Problem(kind=kind, message=message, field=field, found=found, expected=expected, mend=mend)
        super().__init__(message)


def text(value: object, field: str) -> str:
    """A text. Raises RowRefusedError."""
    if isinstance(value, str):
        return value
    raise wrong_type(field, value, "text")


def optional_text(row: dict[str, object], field: str) -> str:
    value = row.get(field)
    return "" if value is None else text(value, field)


def wrong_type(field: str, value: object, expected: str) -> RowRefusedError:
    found = describe(value)
    return RowRefusedError(
        "wrong_type",
        f"{field} is {found} where {expected} is expected",
        field=field,
        found=found,
        expected=expected,
        mend="put it in quotes" if isinstance(value, int | float) else "write it so, or remove the row",
    )


def listing(names: list[str], limit: int = 20) -> str:
    listed = ", ".join(shown(name) for name in names[:limit])
    return f"{listed}, … ({len(names)})" if len(names) > limit else listed or "none"


def nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def listed(value: object, field: str, expected: str) -> list[object]:
    """A list, which a cell of a table holds as JSON. Raises RowRefusedError."""
    value = parse_cell(value)
    if not isinstance(value, list):
        raise wrong_type(field, value, expected)
    return value


def messages_cell(value: object) -> object:
    """Messages that a cell of a table holds as JSON; anything else as it is, since an answer may be JSON itself."""
    found = parse_cell(value)
    items = found if isinstance(found, list) and found else [found]
    return found if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items) else value


def number(value: object, field: str) -> float:
    """A finite number, which a cell of a table holds as text. Raises RowRefusedError."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong_type(field, value, "a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_type(field, value, "a number")
    return value


def filled(value: object, field: str, name: str) -> str:
    """A text that is not blank. Raises RowRefusedError."""
    found = text(value, field)
    if not found.strip():
        raise empty(field, name, found)
    return found


def empty(field: str, name: str, found: str) -> RowRefusedError:
    """Why a row with a blank text is refused; `name` says what the text is."""
    return RowRefusedError(
        f"empty_{name.split()[0]}",
        f"the {name} is empty",
        field=field,
        found=describe(found),
        expected="text",
        mend="fill it in or remove the row",
    )


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encoded(value: object) -> bytes:
    """Compact UTF-8 JSON. Raises UnicodeEncodeError for half of a surrogate pair."""
    return _encoder.encode(value).encode()

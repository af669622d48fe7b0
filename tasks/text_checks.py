"""What is measured on two texts as they are, without tokens: their edit distance, and their JSON field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_MISSING = object()


def check_texts(prediction: str, reference: str) -> dict[str, float | None]:
    """The figures of `configs.scoring.TextChecks` by name, in percent; surrounding whitespace does not count."""
    given, wanted = prediction.strip(), reference.strip()
    return {"edit_distance": 100.0 * edit_distance(given, wanted) / max(len(given), len(wanted), 1)} | {
        name: None if share is None else 100.0 * share for name, share in _compare_json(given, wanted).items()
    }


def edit_distance(first: str, second: str) -> int:
    """Fewest characters to insert, delete or replace to make one text the other (Levenshtein).

    One integer of `len(first)` bits for the steps up and one for the steps down of a column of the usual table, each
    character of `second` one update of both (Myers, JACM 1999; Hyyrö, 2003): texts of thousands of characters take
    milliseconds.
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for index, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << index
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    up, down, distance = every, 0, len(first)
    for character in second:
        equal = places.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal
        right = down | ~(diagonal | up)
        left = up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        vertical = equal | down
        up = (left | ~(vertical | right)) & every
        down = right & vertical & every
    return distance


def _compare_json(prediction: str, reference: str) -> dict[str, float | None]:
    """Shares, 0 to 1; None where the reference is no JSON object or list."""
    wanted = parse_json(reference)
    if wanted is _MISSING:
        return dict.fromkeys(("json_valid", "json_exact", "json_fields"))
    given = parse_json(prediction)
    if given is _MISSING:
        return dict.fromkeys(("json_valid", "json_exact", "json_fields"), 0.0)
    wanted_fields, given_fields = dict(_fields(wanted)), dict(_fields(given))
    right = [path for path, value in wanted_fields.items() if _same(given_fields.get(path, _MISSING), value)]
    return {
        "json_valid": 1.0,
        "json_exact": float(len(right) == len(wanted_fields) == len(given_fields)),
        "json_fields": len(right) / len(wanted_fields),
    }


def equal_json(given: Any, wanted: Any) -> bool:
    """Whether two JSON values are the same, whatever the order of keys; 1 is 1.0, but not true."""
    given_fields, wanted_fields = dict(_fields(given)), dict(_fields(wanted))
    return given_fields.keys() == wanted_fields.keys() and all(
        _same(given_fields[path], value) for path, value in wanted_fields.items()
    )


def parse_json(text: str) -> Any:
    """The JSON object or list that the text is; `_MISSING` for anything else, JSON inside a code fence included."""
    if text[:1] not in ("{", "["):
        return _MISSING
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _MISSING


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _fields(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The values that hold no others, each with its keys and positions from the outside in."""
    open_: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while open_:
        path, item = open_.pop()
        if isinstance(item, dict) and item:
            open_ += [((*path, key), inner) for key, inner in item.items()]
        elif isinstance(item, list) and item:
            open_ += [((*path, place), inner) for place, inner in enumerate(item)]
        else:
            yield path, item


def _same(given: Any, wanted: Any) -> bool:
    # In Python 1 == True; in JSON they are different values, whereas 1 and 1.0 are one number.
    return isinstance(given, bool) is isinstance(wanted, bool) and bool(given == wanted)

"""Edit distance and JSON, field by field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.text_checks import check_texts, edit_distance

quick = settings(max_examples=100, deadline=None, database=None)
texts = st.text("ab灯c", max_size=12)


def by_the_table(first: str, second: str) -> int:
    """The same by the table that every textbook has."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        above, row = row, [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (one != other)))
    return row[-1]


@quick
@given(texts, texts)
def test_edit_distance_is_that_of_the_table(first: str, second: str) -> None:
    assert edit_distance(first, second) == by_the_table(first, second)


def test_edit_distance_in_percent_of_the_longer_text() -> None:
    assert check_texts("kitten", "sitting")["edit_distance"] == pytest.approx(100 * 3 / 7)
    assert check_texts(" on\n", "on")["edit_distance"] == 0
    assert check_texts("", "on")["edit_distance"] == 100
    assert edit_distance("ab" * 5000, "ba" * 5000) == 2


@pytest.mark.parametrize(
    ("prediction", "reference", "valid", "exact", "fields"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 100, 100, 100),
        ('{"a": 1.0}', '{"a": 1}', 100, 100, 100),
        ('{"a": true}', '{"a": 1}', 100, 0, 0),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 100, 0, 50),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 100, 0, 100),
        ('{"a": {"b": 1}}', '{"a": {"b": 1, "c": [1, 2]}}', 100, 0, 100 / 3),
        ('{"a": 1}', '{"a": {"b": 1}}', 100, 0, 0),
        ('{"a": []}', '{"a": {}}', 100, 0, 0),
        ("[1, 2]", "[2, 1]", 100, 0, 0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 0, 0, 0),
        ('{"a": NaN}', '{"a": 1}', 0, 0, 0),
        ("", "[]", 0, 0, 0),
        ("[" * 5000 + "]" * 5000, "[1]", 0, 0, 0),
        ("{}", "on", None, None, None),
        ("1", "1", None, None, None),
    ],
)
def test_json(prediction: str, reference: str, valid: object, exact: object, fields: float | None) -> None:
    found = check_texts(prediction, reference)
    assert (found["json_valid"], found["json_exact"]) == (valid, exact)
    assert found["json_fields"] == (None if fields is None else pytest.approx(fields))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(json_values)
def test_json_equals_itself_however_it_is_laid_out(value: object) -> None:
    wanted = json.dumps({"value": value})
    found = check_texts(json.dumps({"value": value}, indent=2), wanted)
    assert (found["json_valid"], found["json_exact"], found["json_fields"]) == (100, 100, 100)

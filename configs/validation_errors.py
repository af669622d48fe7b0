"""What pydantic found, told as one UserError: file, line, field, value, what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from configs.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a value came from: `spelling` as it was written, with file and line if it stands in a file."""

    spelling: str
    origin: str
    file: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return f"{self.spelling} ({self.origin})"
        return f"{self.spelling} ({self.file}:{self.line})" if self.line else f"{self.spelling} ({self.file})"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    problem: str
    field: str
    place: Place | None = None
    value: object = None
    expected: str | None = None
    mend: str | None = None

    def as_error(self, file: Path | None) -> UserError:
        place = self.place
        written = place.spelling if place else self.field
        same = written in (self.field, self.field.rpartition(".")[2])
        name = self.field if same else f"{self.field} (written {written})".strip()
        if place is not None and place.file is None:
            name += f" ({place.origin})"
        return UserError(
            self.problem,
            file=place.file if place and place.file else (None if place else file),
            line=place.line if place else None,
            field=name,
            value=self.value,
            expected=self.expected,
            mend=self.mend,
        )


def one_error(problems: Sequence[Problem], file: Path | None) -> UserError:
    """One error that tells all problems; a single one keeps its fields."""
    errors = [problem.as_error(file) for problem in problems]
    if len(errors) == 1:
        return errors[0]
    listed = "\n".join(f"{number}. {error}" for number, error in enumerate(errors, 1))
    return UserError(f"{len(errors)} problems in the configuration\n{listed}")


def problems_of(
    details: Sequence[ErrorDetails], places: Mapping[str, Place], expected: Mapping[str, str]
) -> list[Problem]:
    """Pydantic's findings as problems; `places` and `expected` are by dotted canonical name."""
    found: dict[str, Problem] = {}
    for detail in details:
        if detail["type"] == "contradiction":
            problems = _contradictions(detail, places)
        else:
            problems = [_single(detail, places, expected)]
        for problem in problems:
            # A field that is "a number or text" fails once for each; one telling is enough.
            found.setdefault(f"{problem.field} {problem.problem if detail['type'] == 'contradiction' else ''}", problem)
    return list(found.values())


def _single(detail: ErrorDetails, places: Mapping[str, Place], expected: Mapping[str, str]) -> Problem:
    parts = [str(part) for part in detail["loc"]]
    name = next(
        (".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in expected),
        ".".join(parts),
    )
    if detail["type"] == "missing":
        parent = places.get(name.rpartition(".")[0])
        return Problem("a required parameter is missing", name, parent, expected=expected.get(name))
    if detail["type"] == "extra_forbidden":
        return Problem("there is no such field", name, places.get(name), detail["input"])
    text = expected.get(name) or detail["msg"].removeprefix("Value error, ")
    if detail["input"] is None:
        return Problem(
            "no value is given", name, places.get(name), expected=text, mend="leave the line out, or fill it"
        )
    mend = None
    if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
        mend = f'put it in quotes: "{detail["input"]}"'
    return Problem("this value is impossible", name, places.get(name), detail["input"], text, mend)


def _contradictions(detail: ErrorDetails, places: Mapping[str, Place]) -> list[Problem]:
    prefix = "".join(f"{part}." for part in detail["loc"])
    problems = []
    for item in detail["ctx"]["found"]:
        names = [prefix + name for name in item["fields"]]
        given = [places[name] for name in names if name in places]
        first = next((name for name in names if name in places), names[0])
        told = f"{item['problem']}: {', '.join(str(place) for place in given)}" if given else item["problem"]
        problems.append(Problem(told, first, places.get(first), mend=item["mend"]))
    return problems


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings flattened: `{"a": {"b": 1}}` → `{"a.b": 1}`; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(dotted(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat

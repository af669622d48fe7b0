"""The one exception that a user sees: what is wrong, where, and how to mend it."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in something the user gave, told so that it can be mended.

    The command line prints it without a traceback and exits with code 2.
    `problem` is one sentence; the rest is added only where it is known.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        value: object = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = str(file) if file is not None else None
        self.line = line
        self.field = field
        self.value = value
        self.expected = expected
        self.mend = mend
        super().__init__(self._message())

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect pickles exceptions between processes; keyword-only arguments are lost without this.
        state = (self.file, self.line, self.field, self.value, self.expected, self.mend)
        return (_rebuild, (self.problem, *state))

    def _message(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        lines = [f"{where}: {self.problem}" if where else self.problem]
        if self.field is not None:
            shown = f" = {_shorten(self.value)}" if self.value is not None else ""
            lines.append(f"  field: {self.field}{shown}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.mend is not None:
            lines.append(f"  to mend: {self.mend}")
        return "\n".join(lines)


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _rebuild(problem: str, *state: object) -> UserError:
    names = ("file", "line", "field", "value", "expected", "mend")
    return UserError(problem, **dict(zip(names, state, strict=True)))  # type: ignore[arg-type]

"""What Tuneline knows of a dataset: how it is laid out, what a check of it found, and its stored versions."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

Shape = Literal["prompt_completion", "messages", "alpaca", "sharegpt"]
RequestedShape = Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt"]
FileFormat = Literal["jsonl", "json"]
DIGEST_CHARACTERS = 12


class Columns(BaseModel):
    """The columns that hold the prompt and the answer; None means: recognise it by its usual names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(default=None, min_length=1, description="Column of what is asked.")
    completion: str | None = Field(default=None, min_length=1, description="Column of what is answered.")

    @model_validator(mode="after")
    def _differ(self) -> Columns:
        if self.prompt is not None and self.prompt == self.completion:
            raise ValueError(f"prompt and completion both name the column {self.prompt!r}")
        return self


class Problem(BaseModel):
    """One offender. `refused`: the row is left out. `fatal`: so is the unread rest of the file."""

    model_config = ConfigDict(frozen=True)

    kind: str = Field(description="What is wrong, as one word: problems are counted by it.")
    level: Literal["warning", "refused", "fatal"] = "refused"
    line: int | None = Field(default=None, description="Line of the file, from 1.")
    row: int | None = Field(default=None, description="Row of the file, from 1; blank lines are not rows.")
    field: str | None = Field(default=None, description="Column, or place in it: messages[2].role.")
    found: str | None = None
    expected: str | None = None
    message: str = Field(description="The whole problem in one sentence.")
    mend: str | None = None
    count: int = Field(default=1, description="How many of this kind the whole file holds.")


class LengthStatistics(BaseModel):
    """Distribution of a length over the kept rows. Percentiles are by nearest rank."""

    min: int
    mean: float
    p50: int
    p95: int
    max: int


class DatasetReport(BaseModel):
    """What reading a whole file found."""

    file: str
    format: FileFormat
    shape: Shape | None = Field(description="None when no row is an object.")
    columns: Columns = Field(description="Of prompt and completion, as named or recognised.")
    notes: list[str] = Field(description="About the file as a whole: byte-order mark, misleading extension.")
    size_bytes: int
    complete: bool = Field(description="False when reading had to stop before the end.")
    rows_read: int
    rows_kept: int
    refused: dict[str, int] = Field(description="Refused rows by kind of problem.")
    warnings: dict[str, int] = Field(description="What was skipped but is no row: blank lines.")
    problems: list[Problem] = Field(description="The first offenders of each kind.")
    columns_seen: dict[str, int] = Field(description="Rows that hold each column.")
    extra_kept: dict[str, int] = Field(description="Other columns stored under `extra`, with their rows.")
    extra_dropped: dict[str, int] = Field(description="Other columns too big or not scalar: not stored.")
    duplicate_rows: int = Field(description="Kept rows whose messages an earlier row already holds.")
    empty_answers: int
    prompt_characters: LengthStatistics | None = Field(description="All messages but the last; None: no rows.")
    answer_characters: LengthStatistics | None
    turns: LengthStatistics | None = Field(description="Assistant messages of a row.")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_refused(self) -> int:
        return sum(self.refused.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Every row was read and kept, and there is at least one."""
        return self.complete and self.rows_kept > 0 and self.rows_refused == 0


class DatasetVersion(BaseModel):
    """One immutable stored version of a dataset."""

    name: str
    digest: str = Field(description="SHA-256 of the stored rows, in hex.")
    rows: int
    shape: Shape
    columns: Columns
    source: str = Field(description="The file it was made from.")
    created: datetime
    path: Path = Field(description="The stored rows, one canonical row a line.")
    report: DatasetReport

    @property
    def reference(self) -> str:
        """`name@digest12`, which names this version and no other."""
        return f"{self.name}@{self.digest[:DIGEST_CHARACTERS]}"

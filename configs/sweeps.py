"""A sweep: trains of one file that differ in some parameters, and which of them came out best."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from configs.errors import UserError
from configs.records import QueueName, TrainStatus, now
from configs.strict_yaml import parse_scalar, read_yaml
from configs.train import Positive, Text, TrainConfig
from configs.validation_errors import Place, one_error, problems_of

SECTION = "sweep"
"""The key of a train file under which a sweep of it is described."""
MOST_TRAINS = 200

Point = dict[str, Any]
"""Parameters and the values that one train of a sweep gets."""


class Swept(NamedTuple):
    """What a sweep gives one of its trains, and the section of a train file where it stands, if it does in one."""

    values: Point
    file: Path | None = None
    line: int | None = None


class SweepSection(BaseModel):
    """What stands under `sweep:` in a train file."""

    model_config = ConfigDict(extra="forbid")

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = Field(
        default=None, description="Values by parameter; every combination of them is a train."
    )
    trains: list[Point] | None = Field(default=None, alias="list", description="The parameters of each train.")
    by: Text | None = Field(default=None, description="Figure that says which train is best.")
    at_once: Positive | None = Field(default=None, description="How many trains run at the same time.")

    @model_validator(mode="after")
    def _check(self) -> SweepSection:
        if self.grid is not None and self.trains is not None:
            raise PydanticCustomError("sweep", "a sweep has either a grid or a list, not both")
        return self

    @property
    def points(self) -> list[Point]:
        """The parameters of each train, in order: of a grid, the last parameter changes fastest."""
        if self.grid is None:
            return self.trains or []
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class SweepMember(BaseModel):
    """One train of a sweep, before it has begun."""

    number: int = Field(description="From 1, in the order of the sweep.")
    values: Point = Field(description="What the sweep gives it.")
    config: TrainConfig
    origins: dict[str, str]
    warnings: list[str]


class Sweep(BaseModel):
    """A sweep as it is to run. Kept as `sweep.json` in its folder; the same request has the same id."""

    id: str
    name: str = Field(description="Name of every train of it, and so of the line that their models belong to.")
    by: str | None = Field(description="Figure that decides; None: F1, or what the method measures first on its rows.")
    at_once: int
    queue: QueueName
    members: list[SweepMember]
    created: datetime = Field(default_factory=now)


class Standing(BaseModel):
    """How one train of a sweep has come out."""

    number: int
    values: Point
    train: str | None = Field(default=None, description="None: it has not even begun.")
    status: TrainStatus | None = None
    reason: str | None = Field(default=None, description="Why it has no place in the ranking.")
    figure: float | None = None


class SweepOutcome(BaseModel):
    """What a sweep has come to. Kept as `outcome.json` in its folder."""

    sweep: str
    line: str
    by: str
    lower_is_better: bool
    standings: list[Standing] = Field(description="The best one first; those without a figure last.")
    best: str = Field(description="Id of the best train.")
    model: str = Field(description="Its model, which is the `challenger` of the line now.")
    champion: str | None = Field(description="The model that it challenges, if the line has a champion.")
    verdict: str
    page: str | None = Field(default=None, description="MLflow's page of the trains side by side, if it runs.")
    at: datetime = Field(default_factory=now)


def read_section(file: Path) -> tuple[SweepSection, int | None]:
    """The sweep that a train file describes, and its line; an empty one if it describes none. Raises UserError."""
    source = read_yaml(file)
    content = source.values.get(SECTION)
    if content is None:
        return SweepSection(), None
    lines = {keys[1:]: line for keys, line in source.lines.items() if keys[0] == SECTION}
    if not isinstance(content, Mapping):
        raise UserError(
            "this is no sweep", file=file, line=lines[()], field=SECTION, value=content, expected="grid: or list:"
        )
    try:
        return SweepSection.model_validate(content), lines[()]
    except ValidationError as error:
        written = {".".join(keys): line for keys, line in lines.items() if keys}
        places = {name: Place(f"{SECTION}.{name}", f"file {file}", file, line) for name, line in written.items()}
        raise one_error(problems_of(error.errors(), places, {}), file) from error


def read_grid(given: Sequence[str]) -> dict[str, list[Any]]:
    """The grid of `NAME=VALUE,VALUE,...`, or `NAME=[...]` for values that hold a comma. Raises UserError."""
    grid: dict[str, list[Any]] = {}
    for text in given:
        name, equals, listed = (part.strip() for part in text.partition("="))
        parsed = parse_scalar(listed) if listed.startswith("[") else [part.strip() for part in listed.split(",")]
        if not (name and equals) or not isinstance(parsed, list) or "" in parsed or not parsed:
            raise UserError(
                "this names no parameter with values to try",
                field="--over",
                value=text,
                expected="NAME=VALUE,VALUE,..., such as learning_rate=1e-5,1e-4,1e-3",
            )
        if name in grid:
            raise UserError(
                "this parameter is swept twice", field="--over", value=text, mend="give all its values once"
            )
        grid[name] = parsed
    return grid


def told(point: Point) -> str:
    """The parameters of a train of a sweep, in short: `learning_rate=1e-4, lora_rank=8`."""
    return ", ".join(f"{name}={value}" for name, value in point.items())

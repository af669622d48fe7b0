"""Parameter profiles: hyper-parameters and method parameters that were saved under a name, to be picked at a start.

A train records the values, not the profile alone: what it was trained with stays known when the profile changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from configs.aliases import nearest
from configs.errors import UserError
from configs.settings import Settings
from configs.strict_yaml import YamlFile, read_yaml
from configs.train import Slug
from configs.validation_errors import Place, one_error, problems_of


class Profile(BaseModel):
    """A file of the home's `profiles`, named by its profile."""

    model_config = ConfigDict(extra="forbid")

    method: Slug = Field(description="The method whose parameters they are.")
    description: str = Field(default="", max_length=500)
    saved_from: str = Field(description="The train or the file that the values were taken from.")
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    method_params: dict[str, Any] = Field(default_factory=dict)

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The values as a train has them."""
        found = {"hyperparameters": self.hyperparameters, "method_params": self.method_params}
        return {group: values for group, values in found.items() if values}


class RecordedProfile(NamedTuple):
    """The values that a train was given by a profile, as they are recorded with it."""

    name: str
    values: Mapping[str, Mapping[str, Any]]


def list_profiles(settings: Settings) -> dict[str, Profile]:
    """All profiles by name. Raises UserError for a file that is none."""
    return {path.stem: read_profile(path)[0] for path in sorted(settings.profiles.glob("*.yaml"))}


def find_profile(name: str, settings: Settings) -> tuple[Profile, YamlFile]:
    """The profile of that name, with the lines of its file. Raises UserError with the nearest names."""
    path = _path(name, settings)
    if path.is_file():
        return read_profile(path)
    names = [each.stem for each in sorted(settings.profiles.glob("*.yaml"))]
    near = nearest(name, names)
    raise UserError(
        "there is no such profile",
        field="profile",
        value=name,
        expected=f"one of {', '.join(names)}" if names else "none was saved yet",
        mend=f"did you mean {' or '.join(near)}?" if near else "`tuneline profiles save` makes one",
    )


def read_profile(path: Path) -> tuple[Profile, YamlFile]:
    """Read one file of a profile. Raises UserError with the line."""
    source = read_yaml(path)
    try:
        return Profile.model_validate(source.values), source
    except ValidationError as error:
        places = {name: Place(name, f"file {path}", path, source.lines.get((name,))) for name in source.values}
        raise one_error(problems_of(error.errors(), places, {}), path) from error


def write_profile(name: str, profile: Profile, settings: Settings, *, replace: bool = False) -> Path:
    """Write a profile; returns its file. Raises UserError for a name that is taken, unless it is to be replaced."""
    path = _path(name, settings)
    if path.exists() and not replace:
        raise UserError(
            "there is a profile of this name already",
            field="profile",
            value=name,
            mend="choose another name, or replace it with --replace",
        )
    content = profile.model_dump(mode="json", exclude_defaults=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    temporary.replace(path)
    return path


def delete_profile(name: str, settings: Settings) -> None:
    """Delete a profile; trains that were given its values keep them. Raises UserError if there is none."""
    find_profile(name, settings)
    _path(name, settings).unlink()


def _path(name: str, settings: Settings) -> Path:
    try:
        TypeAdapter(Slug).validate_python(name)
    except ValidationError as error:
        raise UserError(
            "not usable as the name of a profile",
            field="profile",
            value=name,
            expected="letters, digits, - _ . (at most 60; first a letter or digit)",
        ) from error
    return settings.profiles / f"{name}.yaml"

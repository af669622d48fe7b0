"""Which training methods there are: each a folder with a `method.yaml`."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from configs.datasets import KINDS_OF_TYPE, Kind
from configs.endpoints import Target
from configs.environments import ENVIRONMENT_NAME
from configs.environments import RECORD as ENVIRONMENT_RECORD
from configs.errors import UserError
from configs.settings import Settings, load_settings

METHODS_FOLDER = Path(__file__).resolve().parent
HOST_ENVIRONMENT = "host"

StageName = Literal["training", "saving", "inference-customized", "inference-complete", "deploying"]
_REQUIRED_STAGE = {"customized": "training", "complete": "saving"}


class StageFile(BaseModel):
    """One stage of a method: its Python file and the environment it runs in."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(description="Python file, relative to the method's folder.")
    environment: str = Field(
        description="`host` (the environment Tuneline runs in), the name of one made from the method's "
        "environment.yml, or the folder of an environment with bin/python, absolute or inside the method's (./env)."
    )


class Hardware(BaseModel):
    """What a method needs of the machine."""

    model_config = ConfigDict(extra="forbid")

    gpu: Literal["required", "optional", "none"] = "optional"
    minimum_memory_gib: float = Field(default=4, gt=0)
    macos: bool = False


class Method(BaseModel):
    """The manifest of a training method (`method.yaml`)."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")
    description: str = Field(min_length=1, max_length=500)
    types: list[Literal["chat", "embedding", "vision-language", "image-generation"]] = Field(min_length=1)
    lifecycle: list[Literal["customized", "complete", "deployed"]] = Field(min_length=1)
    stages: dict[StageName, StageFile]
    deployment_targets: list[Target] = Field(default_factory=list)
    hardware: Hardware = Field(default_factory=Hardware)
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="JSON schema of the parameters only this method has, by name."
    )
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _has_what_its_lifecycle_needs(self) -> Method:
        for step, stage in _REQUIRED_STAGE.items():
            if step in self.lifecycle and stage not in self.stages:
                raise ValueError(f"lifecycle {step} needs the stage {stage}")
        if "deployed" in self.lifecycle and not self.deployment_targets:
            raise ValueError("lifecycle deployed needs deployment_targets")
        if "custom" in self.deployment_targets and "deploying" not in self.stages:
            raise ValueError("the deployment target custom needs the stage deploying")
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of stored rows that it trains on."""
        return tuple(kind for each in self.types for kind in KINDS_OF_TYPE[each])

    def stage_file(self, stage: StageName) -> Path:
        """The absolute path of a stage's Python file. Raises UserError if the method does not have the stage."""
        if stage not in self.stages:
            raise UserError(
                f"the method {self.name} has no stage {stage}",
                file=self.folder / "method.yaml",
                field=f"stages.{stage}",
                expected=f"one of {', '.join(self.stages)}",
            )
        return self.folder / self.stages[stage].file

    def stage_python(self, stage: StageName) -> Path:
        """The interpreter of a stage's environment. Raises UserError if there is none."""
        self.stage_file(stage)
        environment = self.stages[stage].environment
        if environment == HOST_ENVIRONMENT:
            return Path(sys.executable)
        python = self._prefix(stage, environment) / "bin" / "python"
        if not python.exists():
            raise UserError(
                f"the environment of stage {stage} has no interpreter",
                file=self.folder / "method.yaml",
                field=f"stages.{stage}.environment",
                value=environment,
                expected="`host`, the name of an environment, or the folder of one with bin/python",
            )
        return python

    def _prefix(self, stage: StageName, environment: str) -> Path:
        """The folder of an environment of ours, by its name, or of any other one."""
        if re.fullmatch(ENVIRONMENT_NAME, environment):
            link = load_settings().environments / environment
            if not (link / ENVIRONMENT_RECORD).is_file():
                raise UserError(
                    f"the environment of stage {stage} was not made yet",
                    file=self.folder / "method.yaml",
                    field=f"stages.{stage}.environment",
                    value=environment,
                    mend=f"tuneline envs create {self.name}",
                )
            return link.resolve()  # the one there is now, although the link may turn to a newer one
        folder = Path(environment).expanduser()
        if folder.is_absolute():
            return folder
        inside = Path(os.path.normpath(self.folder / folder))
        if not inside.is_relative_to(self.folder):
            raise UserError(
                "this folder is not inside the method's",
                file=self.folder / "method.yaml",
                field=f"stages.{stage}.environment",
                value=environment,
                expected="a folder of the method's, or an absolute path",
            )
        return inside


def load_methods(settings: Settings | None = None) -> dict[str, Method]:
    """All methods by name: the built-in ones, and those that were added to this installation.

    Raises UserError naming the manifest and the field that is wrong.
    """
    added = (settings or load_settings()).methods
    manifests = [*sorted(METHODS_FOLDER.glob("*/method.yaml")), *sorted(added.glob("[!.]*/method.yaml"))]
    return {method.name: method for method in map(read_manifest, manifests)}


def find_method(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest names."""
    methods = load_methods()
    if name not in methods:
        near = get_close_matches(name, methods, n=1)
        raise UserError(
            "no such training method",
            field="method",
            value=name,
            expected=f"one of {', '.join(methods)}",
            mend=f"did you mean {near[0]}?" if near else "`tuneline methods list` shows them",
        )
    return methods[name]


def read_manifest(path: Path) -> Method:
    """Read and check one `method.yaml`. Raises UserError naming the field that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"this is no YAML: {error}", file=path) from error
    if not isinstance(content, dict):
        raise UserError("a manifest is a mapping of fields", file=path, value=content, expected="name: ...")
    try:
        method = Method.model_validate({**content, "folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(first["msg"], file=path, field=field or "method", value=first["input"]) from error
    for name, stage in method.stages.items():
        file = (path.parent / stage.file).resolve()
        if not file.is_file() or path.parent.resolve() not in file.parents:
            raise UserError(
                "no such file inside the method's folder",
                file=path,
                field=f"stages.{name}.file",
                value=stage.file,
            )
    return method

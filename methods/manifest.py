"""The manifest of a training method: what it is, its stages and their environments, its parameters."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs.base_models import ModelType
from configs.datasets import KINDS_OF_TYPE, Kind
from configs.endpoints import Target
from configs.environments import ENVIRONMENT_NAME
from configs.environments import RECORD as ENVIRONMENT_RECORD
from configs.errors import UserError
from configs.parameter_schemas import PATH
from configs.settings import PROJECT_ROOT, load_settings
from configs.train import Hyperparameters, TrainConfig

HOST_ENVIRONMENT = "host"
MANIFEST = "method.yaml"
NAME_PATTERN = r"^[a-z][a-z0-9-]{0,39}$"

StageName = Literal["training", "saving", "inference-customized", "inference-complete", "deploying"]
_REQUIRED_STAGE = {"customized": "training", "complete": "saving"}
ROW_FILES = ("dataset", "validation_dataset", "evaluation_dataset")
"""The fields of a train that a manifest may fill with files: its own, or samples that ship."""
_SHIPPED = PROJECT_ROOT / "configs"


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
    linux: bool = True
    macos: bool = False
    distributions: list[Literal["ddp", "fsdp", "deepspeed"]] = Field(
        default_factory=list, description="How its training can be spread over several processes."
    )


class CommonParameters(BaseModel):
    """How a method takes the hyper-parameters that all methods have in common, where it differs from the others."""

    model_config = ConfigDict(extra="forbid")

    unused: list[str] = Field(default_factory=list, description="Those that it has no use for: not asked, refused.")
    defaults: dict[str, Any] = Field(default_factory=dict, description="Other defaults than the common ones.")
    choices: dict[str, list[Any]] = Field(default_factory=dict, description="The only values that it takes.")


class Method(BaseModel):
    """The manifest of a training method (`method.yaml`)."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    description: str = Field(min_length=1, max_length=500)
    types: list[ModelType] = Field(min_length=1)
    lifecycle: list[Literal["customized", "complete", "deployed"]] = Field(min_length=1)
    datasets: list[Kind] = Field(
        default_factory=list, description="Kinds of rows that it trains on. Left out: those of its types."
    )
    evaluation: list[Kind] = Field(
        default_factory=list,
        description="Kinds of rows that its inference stages are scored on. Left out: those of its types and those "
        "that it trains on.",
    )
    deterministic: bool = Field(
        default=True, description="Whether a train that was interrupted ends exactly as one that was not (on a CPU)."
    )
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="What a train of it is where nobody says otherwise, by the train's own fields (name, base_model, "
        "dataset, ...): with these a form can be sent as it is. Rows: a file of the method's folder, or of configs "
        "(samples/...).",
    )
    hyperparameters: CommonParameters = Field(default_factory=CommonParameters)
    stages: dict[StageName, StageFile]
    deployment_targets: list[Target] = Field(default_factory=list)
    hardware: Hardware = Field(default_factory=Hardware)
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="JSON schema of the parameters only this method has, by name."
    )
    stays_customized: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Parameters of its own with the values that leave what no complete model can be made of.",
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
        """The kinds of rows that it trains on."""
        return tuple(self.datasets) or self._kinds_of_types()

    @property
    def evaluated_kinds(self) -> tuple[Kind, ...]:
        """The kinds of rows that its models can be scored on."""
        return tuple(self.evaluation or dict.fromkeys([*self._kinds_of_types(), *self.datasets]))

    def _kinds_of_types(self) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(kind for each in self.types for kind in KINDS_OF_TYPE[each]))

    @property
    def hyperparameter_names(self) -> list[str]:
        """The common hyper-parameters that it uses, in their common order."""
        return [name for name in Hyperparameters.model_fields if name not in self.hyperparameters.unused]

    @property
    def hyperparameter_defaults(self) -> dict[str, Any]:
        """Its own defaults of common hyper-parameters, by name.

        A method without customized models leaves self-contained weights: full tuning, whether it asks for it or not.
        """
        only_full = {} if "customized" in self.lifecycle else {"tuning": "full"}
        return {**only_full, **self.hyperparameters.defaults}

    def hyperparameter_default(self, name: str) -> Any:
        """What a common hyper-parameter is for this method if nobody sets it."""
        common = Hyperparameters.model_fields[name].get_default(call_default_factory=True)
        return self.hyperparameter_defaults.get(name, common)

    @property
    def train_defaults(self) -> dict[str, Any]:
        """Its own defaults of the train's fields, by name; files of rows with their absolute paths."""
        return {
            name: str(self.row_file(value)) if name in ROW_FILES and value is not None else value
            for name, value in self.train.items()
        }

    def row_file(self, name: str) -> Path:
        """Where a file of rows that the manifest names is: in the method's folder, else among what ships."""
        own = self.folder / name
        return own if own.is_file() else _SHIPPED / name

    @property
    def parameter_defaults(self) -> dict[str, Any]:
        """The defaults of its own parameters, by name; those that are required have none."""
        found = {name: schema["default"] for name, schema in self.parameters.items() if "default" in schema}
        files = [name for name, value in found.items() if value is not None and self.takes_file(name)]
        return found | {name: str(self.folder / found[name]) for name in files}

    def takes_file(self, name: str) -> bool:
        """Whether the parameter of its own is a file."""
        return bool(self.parameters[name].get("format") == PATH)

    def job_parameters(self, config: TrainConfig) -> dict[str, Any]:
        """What its training stage is given: the hyper-parameters that it uses, its own parameters, `max_new_tokens`."""
        values = config.hyperparameters.model_dump(mode="json")
        values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
        common = {name: values[name] for name in self.hyperparameter_names}
        own = {**self.parameter_defaults, **config.method_params}
        return {**common, "max_new_tokens": config.max_new_tokens, **own}

    def stage_file(self, stage: StageName) -> Path:
        """The absolute path of a stage's Python file. Raises UserError if the method does not have the stage."""
        if stage not in self.stages:
            raise UserError(
                f"the method {self.name} has no stage {stage}",
                file=self.folder / MANIFEST,
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
                file=self.folder / MANIFEST,
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
                    file=self.folder / MANIFEST,
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
                file=self.folder / MANIFEST,
                field=f"stages.{stage}.environment",
                value=environment,
                expected="a folder of the method's, or an absolute path",
            )
        return inside

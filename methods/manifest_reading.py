"""Reading a `method.yaml` and refusing a defective one, with the line at fault."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.aliases import spelling_key, spelling_table
from configs.environments import ENVIRONMENT_NAME, read_environment
from configs.environments import RECORD as ENVIRONMENT_RECORD
from configs.errors import UserError
from configs.parameter_schemas import fits, limits, schema_fault
from configs.reference import fields_of, limits_of
from configs.settings import load_settings
from configs.strict_yaml import YamlFile, read_yaml
from configs.train import Hyperparameters, TrainConfig
from methods.manifest import HOST_ENVIRONMENT, ROW_FILES, Method

_HYPER_FIELDS = fields_of(Hyperparameters)
_TRAIN_FIELDS = fields_of(TrainConfig)
_OF_A_TRAIN = [name for name in _TRAIN_FIELDS if name not in ("method", "hyperparameters", "method_params")]
_TAKEN = spelling_table([*TrainConfig.model_fields, *_HYPER_FIELDS, "preset", "profile"])
_Keys = tuple[str, ...]


def read_manifest(path: Path) -> Method:
    """Read and check one `method.yaml`. Raises UserError with the line and the field that is wrong."""
    source = read_yaml(path)
    if "folder" in source.values:
        raise _wrong(source, ("folder",), "there is no such field", source.values["folder"])
    try:
        method = Method.model_validate({**source.values, "folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
        keys = tuple(str(part) for part in first["loc"])
        at = keys or _field_of_lifecycle(first["msg"])
        raise _wrong(
            source, at, first["msg"].removeprefix("Value error, "), first["input"] if keys else None
        ) from error
    for fault in (_file_fault, _environment_fault, _train_fault, _common_fault, _parameter_fault, _customized_fault):
        found = next(fault(method, source), None)
        if found is not None:
            raise found
    return method


def _field_of_lifecycle(message: str) -> _Keys:
    """The field that a requirement of the lifecycle is about."""
    return ("deployment_targets",) if "target custom" in message else ("lifecycle",)


def _wrong(
    source: YamlFile, keys: _Keys, problem: str, value: object, expected: str | None = None, mend: str | None = None
) -> UserError:
    """An error at the line of the innermost of the keys that stands in the file, or where what is in it begins."""
    begins = min(source.lines.values(), default=1)
    line = next((source.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in source.lines), begins)
    field = ".".join(keys) or "method"
    return UserError(problem, file=source.path, line=line, field=field, value=value, expected=expected, mend=mend)


def _file_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    for name, stage in method.stages.items():
        if not _is_inside(method.folder, stage.file):
            yield _wrong(
                source,
                ("stages", name, "file"),
                "no such file inside the method's folder",
                stage.file,
                "a file of the method's folder, by its path from there",
            )


def _is_inside(folder: Path, name: str) -> bool:
    """Whether this is a file of the folder; a link that leads round in a circle or out of it is none."""
    try:
        file = (folder / name).resolve()
        return file.is_file() and folder.resolve() in file.parents
    except (OSError, RuntimeError, ValueError):
        return False


def _environment_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    own = [read_environment(path).name for path in sorted(method.folder.glob("environment*.yml"))]
    for name, stage in method.stages.items():
        keys, environment = ("stages", name, "environment"), stage.environment
        if not re.fullmatch(ENVIRONMENT_NAME, environment):
            folder = Path(environment).expanduser()
            inside = Path(os.path.normpath(method.folder / folder)).is_relative_to(method.folder)
            if not folder.is_absolute() and not inside:
                problem = "this folder is not inside the method's"
                yield _wrong(source, keys, problem, environment, "a folder of the method's, or an absolute path")
        elif environment not in (HOST_ENVIRONMENT, *own) and not _is_made(environment):
            yield _wrong(
                source,
                keys,
                f"the environment of stage {name} is unknown",
                environment,
                f"one of {', '.join([HOST_ENVIRONMENT, *own])}, or the folder of an environment",
                f"put an environment.yml with `name: {environment}` beside the manifest",
            )


def _is_made(environment: str) -> bool:
    return (load_settings().environments / environment / ENVIRONMENT_RECORD).is_file()


def _train_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    """What is wrong with what a train of it is where nobody says otherwise."""
    for name, value in method.train.items():
        if name not in _OF_A_TRAIN:
            near = get_close_matches(name, _OF_A_TRAIN, n=1)
            mend = f"did you mean {near[0]}?" if near else None
            expected = f"one of {', '.join(_OF_A_TRAIN)}"
            yield _wrong(source, ("train", name), "a manifest gives a train no such field", value, expected, mend)
        elif name in ROW_FILES and isinstance(value, str) and not method.row_file(value).is_file():
            where = "a file of the method's folder, or of configs (samples/...)"
            yield _wrong(source, ("train", name), "there is no such file", value, where)
    try:
        TrainConfig.model_validate({"name": "a", "base_model": "b", "dataset": "c", **method.train})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        limits = limits_of(_TRAIN_FIELDS[name]) if name in _TRAIN_FIELDS else None
        keys = ("train", name) if name else ("train",)
        yield _wrong(source, keys, f"this default is impossible: {first['msg']}", method.train.get(name), limits)


def _common_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    """What is wrong with how the common hyper-parameters are taken."""
    common = method.hyperparameters
    named = {"unused": common.unused, "defaults": common.defaults, "choices": common.choices}
    for group, names in named.items():
        for place, name in enumerate(names):
            keys = ("hyperparameters", group, str(place) if group == "unused" else name)
            if name not in _HYPER_FIELDS:
                near = get_close_matches(name, _HYPER_FIELDS, n=1)
                mend = f"did you mean {near[0]}?" if near else None
                yield _wrong(source, keys, "there is no such hyper-parameter", name, mend=mend)
            elif group != "unused" and name in common.unused and name != "tuning":
                problem = "this hyper-parameter is said to be unused as well"
                yield _wrong(source, keys, problem, named[group], "one of both")
    for name, values in common.choices.items():
        keys = ("hyperparameters", "choices", name)
        for value in values:
            yield from _hyper_fault(source, keys, {name: value})
        if method.hyperparameter_default(name) not in values:
            problem = f"its default, {method.hyperparameter_default(name)}, is none of the choices"
            yield _wrong(source, keys, problem, values, mend=f"choose one of them: defaults: {{{name}: ...}}")
    if "customized" not in method.lifecycle and method.hyperparameter_default("tuning") != "full":
        keys = ("hyperparameters", "defaults", "tuning")
        problem = "without the lifecycle customized there is no place for an adapter"
        yield _wrong(source, keys, problem, common.defaults.get("tuning"), "full")
    only_full = [common.defaults.get("tuning")] if "tuning" in common.unused else common.choices.get("tuning")
    if "customized" in method.lifecycle and only_full == ["full"]:
        keys = ("hyperparameters", "defaults" if "tuning" in common.unused else "choices", "tuning")
        problem = "full tuning leaves self-contained weights, and no customized model"
        yield _wrong(source, keys, problem, only_full, mend="take customized out of the lifecycle")
    for name, value in common.defaults.items():
        yield from _hyper_fault(source, ("hyperparameters", "defaults", name), {name: value})
    yield from _hyper_fault(source, ("hyperparameters", "defaults"), method.hyperparameter_defaults)


def _hyper_fault(source: YamlFile, keys: _Keys, values: Mapping[str, Any]) -> Iterator[UserError]:
    try:
        Hyperparameters.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else keys[-1]
        expected = limits_of(_HYPER_FIELDS[name]) if name in _HYPER_FIELDS else None
        yield _wrong(source, keys, f"this default is impossible: {first['msg']}", values.get(name), expected)


def _parameter_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    """What is wrong with the method's own parameters."""
    seen: dict[str, str] = {}
    for name, schema in method.parameters.items():
        keys = ("parameters", name)
        taken = _TAKEN.get(spelling_key(name)) or seen.get(spelling_key(name))
        if taken is not None:
            yield _wrong(source, keys, f"this name is taken by the parameter {taken}", name, mend="choose another one")
        seen[spelling_key(name)] = name
        fault = schema_fault(name, schema)
        if fault is not None:
            at = keys if fault.key is None else (*keys, fault.key)
            yield _wrong(source, at, fault.problem, fault.value, fault.expected)
        elif method.takes_file(name) and schema.get("default") and not _is_inside(method.folder, schema["default"]):
            problem = "no such file inside the method's folder"
            yield _wrong(source, (*keys, "default"), problem, schema["default"], "a file of it, or `default: null`")


def _customized_fault(method: Method, source: YamlFile) -> Iterator[UserError]:
    """What is wrong with the values that are said to leave no complete model."""
    for name, values in method.stays_customized.items():
        keys = ("stays_customized", name)
        if name not in method.parameters:
            expected = f"one of {', '.join(method.parameters)}" if method.parameters else None
            yield _wrong(source, keys, "the method has no such parameter of its own", name, expected)
        elif other := [value for value in values if not fits(method.parameters[name], value)]:
            expected = limits(method.parameters[name])
            yield _wrong(source, keys, "the parameter does not take this value", other[0], expected)

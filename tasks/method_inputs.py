"""What a train gives its method beside rows: models of ours and files, fixed so that the record alone repeats it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.method_values import OWN
from configs.parameter_schemas import MODEL, PATH, limits
from configs.records import ModelRecord, TrainRecord
from configs.settings import load_settings
from configs.train import TrainConfig
from methods.registry import find_method
from tasks.files import read_record
from tasks.models import find_model

_FOLDER = "files"


def fixed_models(config: TrainConfig) -> TrainConfig:
    """The configuration with the name of the very model for each one it names; an alias may move on. Raises UserError.

    Only a model that a completed train has made is taken.
    """
    names = {name: _own_model(config, name, reference).name for name, reference in _given(config, MODEL).items()}
    return _changed(config, names)


def _own_model(config: TrainConfig, name: str, reference: str) -> ModelRecord:
    field = f"{OWN}.{name}"
    expected = limits(find_method(config.method).parameters[name])
    model = find_model(reference)
    if model.train is None:
        raise UserError("this model was not trained here", field=field, value=reference, expected=expected)
    record = load_settings().trains / model.train / "train.json"
    status = read_record(record, TrainRecord).status if record.is_file() else "deleted"
    if status != "completed":
        raise UserError(
            f"the train that made this model, {model.train}, is {status}",
            field=field,
            value=reference,
            expected=expected,
            mend=f"`tuneline trains resume {model.train}`" if status != "deleted" else None,
        )
    return model


def with_copied_files(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration with copies, in the train's folder, of the files it names: the originals may change."""
    copies = {}
    for name, file in _given(config, PATH).items():
        copy = folder / _FOLDER / name / Path(file).name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(file).expanduser(), copy)
        copies[name] = str(copy)
    return _changed(config, copies)


def copied_files(config: TrainConfig) -> list[Path]:
    """The copies of the files that a train gives its method."""
    return [Path(file) for file in _given(config, PATH).values()]


def method_inputs(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What the training stage finds under `models` and `files` of its inputs, by the parameter's name."""
    models = {name: find_model(reference) for name, reference in _given(config, MODEL).items()}
    return {
        "models": {
            name: {
                "path": str(model.path),
                "base_model": str(model.base_path) if model.adapter else None,
                "adapter": model.adapter,
                "method": model.method,
            }
            for name, model in models.items()
        },
        "files": _given(config, PATH),
    }


def model_folders(inputs: dict[str, dict[str, Any]]) -> list[Path]:
    """The folders that the models among a method's inputs are loaded from."""
    named = [model[name] for model in inputs["models"].values() for name in ("path", "base_model")]
    return [Path(folder) for folder in named if folder is not None]


def _given(config: TrainConfig, kind: str) -> dict[str, str]:
    """The values of the method's parameters of this format that are set, by name."""
    parameters = find_method(config.method).parameters
    given = config.method_params
    named = [name for name, schema in parameters.items() if schema.get("format") == kind]
    return {name: given[name] for name in named if given.get(name) is not None}


def _changed(config: TrainConfig, values: dict[str, str]) -> TrainConfig:
    return config.model_copy(update={OWN: {**config.method_params, **values}})

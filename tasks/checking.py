"""What can be told about a train before anything of it is begun: no record, no MLflow run, no file is made."""

from __future__ import annotations

from configs.aliases import nearest
from configs.base_models import find_base_model
from configs.datasets import Columns, DatasetReport, Wanted
from configs.errors import UserError
from configs.settings import load_settings
from configs.train import TrainConfig, path_of
from methods.registry import Method, find_method
from tasks.base_models import require_safetensors
from tasks.datasets import check_reference
from tasks.gpus import wanted_gpus
from tasks.models import own_base

_DATASETS = ("dataset", "validation_dataset", "evaluation_dataset")


def check_train(config: TrainConfig) -> dict[str, DatasetReport]:
    """Check method, GPUs, base model and every row of the datasets; returns the reports by field.

    Nothing is stored and nothing is fetched. Raises UserError for the first fault.
    """
    method = find_method(config.method)
    _check_method(method, config)
    wanted_gpus(config)
    _check_base(config.base_model)
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    given = {name: getattr(config, name) for name in _DATASETS if getattr(config, name) is not None}
    wanted = Wanted(method.name, method.kinds)
    return {
        name: check_reference(
            reference, columns, config.dataset_shape, allow_refused=config.allow_refused_rows, wanted=wanted
        )
        for name, reference in given.items()
    }


def _check_base(reference: str) -> None:
    settings = load_settings()
    if own_base(reference, settings) is not None:
        return
    entry = find_base_model(reference, settings)
    if entry.path is not None:
        require_safetensors(entry.path)


def _check_method(method: Method, config: TrainConfig) -> None:
    if "training" not in method.stages:
        raise UserError("this method does not train", field="method", value=method.name)
    missing = [step for step in path_of(config) if step not in method.lifecycle]
    if missing:
        raise UserError(
            f"the method {method.name} does not go as far as {missing[-1]}",
            field="through",
            value=config.through,
            expected=f"one of {', '.join(method.lifecycle)}",
        )
    method.stage_python("training")
    if "complete" in path_of(config):
        method.stage_python("saving")
    for name in config.method_params:
        if name not in method.parameters:
            raise _unknown_parameter(method, name)


def _unknown_parameter(method: Method, name: str) -> UserError:
    near = nearest(name, list(method.parameters))
    return UserError(
        f"the method {method.name} has no such parameter of its own, so nothing would read it",
        field=f"method_params.{name}",
        expected=f"one of {', '.join(method.parameters)}" if method.parameters else "no method_params",
        mend=f"did you mean {' or '.join(near)}?" if near else f"`tuneline methods show {method.name}` lists them",
    )

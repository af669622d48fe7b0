"""What can be told about a train before anything of it is begun: no record, no MLflow run, no file is made."""

from __future__ import annotations

from configs.base_models import find_base_model
from configs.datasets import Columns, DatasetReport, Wanted
from configs.errors import UserError
from configs.method_values import checked_values
from configs.settings import load_settings
from configs.train import DATASETS, TrainConfig, path_of
from methods.registry import Method, StageName, find_method
from tasks.base_models import check_code, require_safetensors
from tasks.datasets import check_reference
from tasks.gpus import wanted_gpus
from tasks.launching import require_packages
from tasks.method_inputs import fixed_models
from tasks.models import own_base
from tasks.scoring import scoring_options
from tasks.stop_words import read_stop_words


def check_train(config: TrainConfig) -> dict[str, DatasetReport]:
    """Check method, GPUs, base model and every row of the datasets; returns the reports by field.

    Nothing is stored and nothing is fetched. Raises UserError for the first fault.
    """
    method = find_method(config.method)
    config = checked_values(config)
    check_method(method, config)
    wanted_gpus(config)
    fixed_models(config)
    _check_base(config.base_model)
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    given = {name: getattr(config, name) for name in DATASETS if getattr(config, name) is not None}
    reports = {
        name: check_reference(
            reference,
            columns,
            config.dataset_shape,
            allow_refused=config.allow_refused_rows,
            wanted=wanted_rows(method, name),
        )
        for name, reference in given.items()
    }
    _check_scoring(config, reports.get("evaluation_dataset"))
    return reports


def _check_scoring(config: TrainConfig, evaluation: DatasetReport | None) -> None:
    read_stop_words(config.stop_words)
    if evaluation is None:
        return
    for column in scoring_options(config).by:
        if column not in evaluation.extra_kept:
            raise UserError(
                "the evaluation rows have no further column of this name to be scored by",
                field="evaluation_by",
                value=column,
                expected=f"one of: {', '.join(evaluation.extra_kept) or '(they have none)'}",
            )


def wanted_rows(method: Method, field: str) -> Wanted:
    """The kinds of rows that the method takes as this dataset of a train."""
    return Wanted(method.name, method.evaluated_kinds if field == "evaluation_dataset" else method.kinds)


def _check_base(reference: str) -> None:
    settings = load_settings()
    if own_base(reference, settings) is not None:
        return
    entry = find_base_model(reference, settings)
    if entry.path is not None:
        require_safetensors(entry.path)
        check_code(entry, settings)


def check_method(method: Method, config: TrainConfig) -> None:
    """Refuse a train that the method cannot take as far as it is to go, or not score. Raises UserError."""
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
    require_packages(config, method.stage_python("training"))
    if "complete" in path_of(config):
        method.stage_python("saving")
    if config.evaluation_dataset is not None and not scored_stages(method):
        raise UserError(
            f"models of the method {method.name} cannot be scored: it has no inference stage",
            field="evaluation_dataset",
            value=config.evaluation_dataset,
            mend="leave it out",
        )


def scored_stages(method: Method) -> list[StageName]:
    """The stages of the method whose answers can be scored."""
    named: tuple[StageName, ...] = ("inference-customized", "inference-complete")
    return [stage for stage in named if stage in method.stages]

"""The models there are: records beside the weights, versions and aliases in the MLflow registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from configs.base_models import ModelType, find_base_model, load_base_models
from configs.errors import UserError
from configs.records import ModelRecord
from configs.scoring import SCORE_TITLES
from configs.settings import Settings, load_settings
from tasks.files import read_record, write_record
from tasks.stages import EventHandler
from tasks.tracking import code_version, experiment_id, mlflow_client

RECORD_FILE = "tuneline.json"
_METHOD_OF_TYPE: dict[ModelType, str] = {
    "chat": "sft",
    "embedding": "embedding",
    "vision-language": "vision-language",
    "image-generation": "image-generation",
}
"""The built-in method whose inference stage asks a base model of each type."""


def publish_model(record: ModelRecord, product: Path) -> ModelRecord:
    """Move a stage's product to the model store under the model's name, whole or not at all, and register it.

    A rerun after a kill finds the folder in place and goes on with the registration.
    """
    if not record.path.exists():
        record.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(product / RECORD_FILE, record)
        product.replace(record.path)
    return register_model(record)


def register_model(record: ModelRecord) -> ModelRecord:
    """Make a version of the model's line in the MLflow registry; a model that has one already keeps it.

    The weights stay where they are: the version holds the record that says where. A base model is registered when
    it is first deployed; its record lies in the model store although its weights do not.
    """
    version = _version_of(record) or _create_version(record)
    return _store(record.model_copy(update={"registered_version": version}))


def _store(record: ModelRecord) -> ModelRecord:
    write_record(load_settings().models / record.name / RECORD_FILE, record)
    return record


def note_evaluation(record: ModelRecord, figures: Mapping[str, float]) -> ModelRecord:
    """Add the scores of the model's own answers (in percent) to its record and to its version's tags."""
    record = _store(record.model_copy(update={"evaluation": dict(figures), "evaluated": record.name}))
    if record.registered_version is not None:
        client = mlflow_client()
        for name, value in _score_tags(record).items():
            client.set_model_version_tag(record.line, record.registered_version, name, value)
    return record


def logged_model_id(record: ModelRecord) -> str | None:
    """The id of a registered model as MLflow's logged model, which metrics can belong to; None if it is none."""
    if record.registered_version is None:
        return None
    version = mlflow_client().get_model_version(record.line, record.registered_version)
    return str(version.source).removeprefix("models:/")


def _create_version(record: ModelRecord) -> str:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client = mlflow_client()
    logged = _logged_model(record)
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder) / RECORD_FILE, record)
        for extra in ("adapter_config.json", "config.json"):
            if (record.path / extra).exists():
                shutil.copyfile(record.path / extra, Path(folder) / extra)
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    if record.run_id is not None and logged.model_id not in _outputs(record.run_id):
        client.log_outputs(record.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(record.line)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        record.line,
        source=f"models:/{logged.model_id}",
        run_id=record.run_id,
        tags=_lineage(record),
        model_id=logged.model_id,
    )
    return str(version.version)


def _logged_model(record: ModelRecord) -> Any:
    """The model as MLflow's logged model; the one that a killed registration has begun is taken up again."""
    client, experiment = mlflow_client(), experiment_id(load_settings())
    begun = client.search_logged_models([experiment], filter_string=f"tags.`tuneline.model` = '{record.name}'")
    if begun:
        return begun[0]
    # MLflow allows no dot in this name (`qwen2.5`); the tag holds the true one, which is what is searched for.
    name = record.name.replace(".", "-")
    return client.create_logged_model(
        experiment, name=name, source_run_id=record.run_id, tags=_lineage(record), model_type=record.stage
    )


def _outputs(run_id: str) -> set[str]:
    outputs = mlflow_client().get_run(run_id).outputs
    return {output.model_id for output in outputs.model_outputs} if outputs is not None else set()


def _version_of(record: ModelRecord) -> str | None:
    wanted = f"name = '{record.line}' and tags.`tuneline.model` = '{record.name}'"
    found = mlflow_client().search_model_versions(wanted)
    return str(found[0].version) if found else None


def _lineage(record: ModelRecord) -> dict[str, str]:
    tags = {
        "model": record.name,
        "stage": record.stage,
        "base": record.base,
        "method": record.method,
        "parent": record.parent,
        "train": record.train,
        "dataset": record.dataset,
        "step": None if record.step is None else str(record.step),
        "uri": record.path.as_uri(),
        "code_version": code_version(),
    }
    named = {f"tuneline.{name}": value for name, value in tags.items() if value is not None}
    return named | _score_tags(record)


def _score_tags(record: ModelRecord) -> dict[str, str]:
    scores = {f"tuneline.score.{name}": _score(name, value) for name, value in record.evaluation.items()}
    return scores | ({"tuneline.evaluated": record.evaluated} if record.evaluated else {})


def _score(name: str, value: float) -> str:
    """Percent as everywhere; a figure of a method's own with its digits, whatever its size."""
    return f"{value:.2f}" if name in SCORE_TITLES else f"{value:.4g}"


def set_alias(record: ModelRecord, alias: str) -> None:
    """Let `alias` (champion, challenger, deployed) of the model's line point to this model."""
    version = _version_of(record) or str(register_model(record).registered_version)
    mlflow_client().set_registered_model_alias(record.line, alias, version)


def alias_holder(line: str, alias: str) -> str | None:
    """Name of the model that has the alias in a line; None if the line is not there or no model has it."""
    from mlflow.exceptions import MlflowException

    client = mlflow_client()
    try:
        version = client.get_registered_model(line).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if version is None else str(client.get_model_version(line, version).tags["tuneline.model"])


def clear_alias(line: str, alias: str) -> None:
    """Take an alias away from a line; nothing happens if it has none."""
    mlflow_client().delete_registered_model_alias(line, alias)


def list_models(settings: Settings | None = None) -> list[ModelRecord]:
    """Every customized and complete model, and every base model that was deployed, oldest first."""
    settings = settings or load_settings()
    found = [read_record(path, ModelRecord) for path in settings.models.glob(f"*/{RECORD_FILE}")]
    return sorted(found, key=lambda record: record.created)


def find_model(reference: str, settings: Settings | None = None) -> ModelRecord:
    """The model of a reference: its name or folder, LINE@ALIAS, the id or name of its train (the newest), or a base.

    Raises UserError with the nearest names.
    """
    settings = settings or load_settings()
    models = {record.name: record for record in list_models(settings)}
    if "@" in reference:
        reference = _name_of_alias(*reference.rsplit("@", 1))
    if reference in models:
        return models[reference]
    folder = Path(reference).expanduser().absolute()
    of_train = [record for record in models.values() if record.train == reference or record.path == folder]
    if of_train:
        return _newest(of_train)
    of_line = [record for record in models.values() if record.line == reference and record.stage != "base"]
    if of_line:
        return _newest(of_line)
    if _is_base(reference, settings):
        return base_record(reference, settings)
    known = [*models, *load_base_models(settings)]
    near = get_close_matches(reference, known, n=2)
    raise UserError(
        "there is no such model",
        field="model",
        value=reference,
        expected="the name of a model, LINE@ALIAS, a train, a base model, a folder or a hub id",
        mend=f"did you mean {' or '.join(near)}?" if near else "`tuneline models list` shows them",
    )


def _newest(found: list[ModelRecord]) -> ModelRecord:
    """The newest model of a train or line; one that was made of a checkpoint by itself only where there is no other."""
    return next((each for each in reversed(found) if not each.from_checkpoint), found[-1])


def own_base(reference: str, settings: Settings) -> ModelRecord | None:
    """The complete model of one's own that a train is to start from, by its name or LINE@ALIAS; None for another.

    Raises UserError for one that is not self-contained.
    """
    name = _name_of_alias(*reference.rsplit("@", 1)) if "@" in reference else reference
    record = next((model for model in list_models(settings) if model.name == name and model.stage != "base"), None)
    if record is not None and record.adapter:
        raise UserError(
            "a train starts from self-contained weights, and this is an adapter",
            field="base_model",
            value=reference,
            mend=f"`tuneline save {name}` makes a complete model of it",
        )
    return record


def base_folder(reference: str, settings: Settings, on_events: EventHandler = lambda events: None) -> tuple[str, Path]:
    """Name and folder of what a train starts from: a complete model of one's own, or a base model, fetched if need be.

    Raises UserError if there is none.
    """
    own = own_base(reference, settings)
    if own is not None:
        return own.name, own.path
    base = base_record(reference, settings, on_events)
    return base.name, base.path


def _name_of_alias(line: str, alias: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        version = mlflow_client().get_model_version_by_alias(line, alias)
    except MlflowException as error:
        raise UserError(
            f"no model of {line} has the alias {alias}",
            field="model",
            value=f"{line}@{alias}",
            mend="`tuneline models list` shows lines and aliases",
        ) from error
    return str(version.tags["tuneline.model"])


def _is_base(reference: str, settings: Settings) -> bool:
    try:
        find_base_model(reference, settings)
    except UserError:
        return False
    return True


def base_record(reference: str, settings: Settings, on_events: EventHandler = lambda events: None) -> ModelRecord:
    """A base model as a model record, its weights fetched if need be; `on_events` is given the phases of that."""
    from tasks.base_models import fetch_base_model

    entry = find_base_model(reference, settings)
    path = fetch_base_model(entry, settings, on_events)
    method = _METHOD_OF_TYPE[entry.type]
    return ModelRecord(
        name=entry.name, stage="base", path=path, line=entry.name, base=entry.name, base_path=path, method=method
    )


def aliases_by_model() -> dict[str, list[str]]:
    """The aliases of each model that has any, by model name."""
    found: dict[str, list[str]] = {}
    client = mlflow_client()
    for line in client.search_registered_models(max_results=1000):
        for alias, version in line.aliases.items():
            tags = client.get_model_version(line.name, version).tags
            found.setdefault(tags.get("tuneline.model", line.name), []).append(alias)
    return found

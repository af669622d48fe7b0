"""The verbs of a train: open its record, prepare, train, register, save, evaluate, close. Each can be repeated."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from configs.datasets import Columns, DatasetVersion
from configs.errors import UserError
from configs.method_values import checked_values
from configs.records import ModelRecord, Resolution, SweepPlace, TrainRecord, TrainStatus, now
from configs.resolve import copied_trains
from configs.settings import Settings, load_settings
from configs.train import DATASETS, TrainConfig
from methods import contract
from methods.registry import find_method
from methods.toolkit.thoughts import rows_have_thoughts
from tasks import cancelling, models, tracking
from tasks.checking import check_method, wanted_rows
from tasks.dataset_report import write_report
from tasks.datasets import describe_datasets, find_dataset, resolve_dataset, write_split
from tasks.environments import packages_of
from tasks.evaluation import evaluate, keep_evaluation, kept_evaluation
from tasks.files import read_record, write_record, write_text
from tasks.gpus import Withdrawn, borrowing_slot, release_slots, take_slots, wanted_gpus, withdraw_ticket
from tasks.inference import Generation, inference_stage
from tasks.launching import launcher
from tasks.measuring import TEXT_KINDS, keep_measurement, measure
from tasks.method_inputs import copied_files, fixed_models, method_inputs, model_folders, with_copied_files
from tasks.model_folders import prints_date
from tasks.pages import as_html
from tasks.plots import draw_curves
from tasks.remote_code import allowed_digests, code_record
from tasks.scoring import scoring_options
from tasks.stages import EventTail, StageCancelled, StageJob, locked, run_stage
from tasks.train_report import train_report

RECORD_FILE = "train.json"
_NOT_KEPT = "not_kept.txt"  # in a training folder: its files are not, or not all, with the MLflow run
EventHandler = Callable[[list[dict[str, Any]]], None]


def train_folder(train_id: str, settings: Settings | None = None) -> Path:
    """The folder of a train. Raises UserError for an id that would leave the store."""
    root = (settings or load_settings()).trains
    folder = root / train_id
    if folder.parent != root or train_id in (".", ".."):
        raise UserError("this is no id of a train", field="train", value=train_id)
    return folder


def save_record(record: TrainRecord) -> TrainRecord:
    """Write the record to its folder and return it."""
    write_record(train_folder(record.id) / RECORD_FILE, record)
    return record


def update_train(train_id: str, **changes: Any) -> TrainRecord:
    """Change the record on disk, not the caller's copy of it, which an earlier verb may have left behind."""
    record = read_record(train_folder(train_id) / RECORD_FILE, TrainRecord)
    return save_record(record.model_copy(update=changes))


def load_train(reference: str) -> TrainRecord:
    """The train of an id, or the newest one of a name. Raises UserError with the ids there are."""
    path = train_folder(reference) / RECORD_FILE
    if path.exists():
        return read_record(path, TrainRecord)
    named = [record for record in list_trains() if record.config.name == reference]
    if named:
        return named[-1]
    known = ", ".join(record.id for record in list_trains()[-5:]) or "none yet"
    raise UserError(
        "there is no such train",
        field="train",
        value=reference,
        expected=f"the id or the name of a train; the newest are: {known}",
        mend="`tuneline trains list` shows them all",
    )


def list_trains() -> list[TrainRecord]:
    """Every train of this host, oldest first."""
    paths = load_settings().trains.glob(f"*/{RECORD_FILE}")
    return sorted((read_record(path, TrainRecord) for path in paths), key=lambda record: record.created)


_owned: dict[str, BinaryIO] = {}


def own_train(train_id: str) -> None:
    """Take a train for this process until `let_go`; the system frees it if the process dies, whichever way.

    Raises UserError if another process has it.
    """
    if train_id in _owned:
        return
    folder = train_folder(train_id)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("ab")
    # Whoever asks for the status holds the lock for an instant.
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _owned[train_id] = file
            cancelling.note_owner(folder)
            return
        time.sleep(0.05)
    file.close()
    raise UserError(
        "this train is already running",
        field="train",
        value=train_id,
        mend=f"wait for it, or `tuneline trains cancel {train_id}`",
    )


def let_go(train_id: str) -> None:
    """Give up a train that this process owns, and the GPUs it holds for it."""
    release_slots(train_id)
    cancelling.forget_owner(train_folder(train_id))
    file = _owned.pop(train_id, None)
    if file is not None:
        file.close()


def current_status(record: TrainRecord) -> TrainStatus:
    """How the train stands now: a process that was killed could not say so in the record, and is `interrupted`.

    One that was killed while it was being stopped is `cancelled`.
    """
    if record.status != "running" or record.id in _owned:
        return record.status
    lock = train_folder(record.id) / "lock"
    if not lock.exists():
        return _ended(record)
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "running"
        # It may have ended, and said so, since the record was read.
        status = load_train(record.id).status
    return _ended(record) if status == "running" else status


def _ended(record: TrainRecord) -> TrainStatus:
    return "cancelled" if cancelling.was_stopping(train_folder(record.id)) else "interrupted"


def settle_trains() -> list[TrainRecord]:
    """Close the trains whose process was killed, and tell MLflow what it could not be told while it was away.

    Returns the trains that were found so.
    """
    settled = []
    for record in list_trains():
        status = current_status(record)
        if record.status == "running" and status in ("interrupted", "cancelled"):
            try:
                own_train(record.id)
            except UserError:  # another process closes it, or takes it up, at this moment
                continue
            why = {"interrupted": "the process that ran it was ended", "cancelled": "killed while it was being stopped"}
            settled.append(close_train(record, status, why[status]))
        elif record.status != "running" and _untold(record.id).exists():
            _tell_end(record)
    return settled


def open_train(
    config: TrainConfig, origins: Mapping[str, str], warnings: list[str], sweep: SweepPlace | None = None
) -> TrainRecord:
    """Begin a new train: an id, a folder, an MLflow run that holds the configuration and its origins.

    Models and files that the method is given are fixed: the name of the very model, a copy of the file. Raises
    UserError for what cannot be trained.
    """
    config = checked_values(config)
    check_method(find_method(config.method), config)
    wanted_gpus(config)  # refused here, not when everything is prepared
    config = fixed_models(config)
    created = now()
    train_id = f"{config.name}_{created:%Y%m%d}_{secrets.token_hex(2)}"
    run_id = tracking.start_run(
        train_id,
        "train",
        {
            "tuneline.train": train_id,
            "tuneline.method": config.method,
            "tuneline.base": config.base_model,
            "mlflow.note.content": config.description,
            **({"tuneline.sweep": sweep.sweep} if sweep is not None else {}),
            **({"tuneline.copied_from": ", ".join(copied)} if (copied := copied_trains(origins.values())) else {}),
        },
    )
    record = TrainRecord(
        id=train_id,
        config=config,
        origins=dict(origins),
        warnings=warnings,
        created=created,
        run_id=run_id,
        sweep=sweep,
        code_version=tracking.code_version(),
    )
    own_train(record.id)
    save_record(record)
    try:
        record = update_train(record.id, config=with_copied_files(config, train_folder(record.id)))
        tracking.log_config(record)
        tracking.log_files(record.run_id, copied_files(record.config), "files")
    except Exception as error:
        close_train(record, "failed", str(error))
        raise
    return record


def reopen_train(record: TrainRecord) -> TrainRecord:
    """Take up a train where it ended: the same record and MLflow run, from its newest whole checkpoint.

    Waits for a stage that has lost its parent and is saving its checkpoint. Raises UserError if the train runs.
    """
    own_train(record.id)
    try:
        cancelling.take_back(train_folder(record.id))
        _wait_for_stage(train_folder(record.id) / "training")
        tracking.reopen_run(record.run_id)
    except BaseException:
        let_go(record.id)
        raise
    _untold(record.id).unlink(missing_ok=True)
    return update_train(record.id, status="running", reason=None, ended=None, attempts=record.attempts + 1)


def _wait_for_stage(folder: Path) -> None:
    deadline = time.monotonic() + load_settings().grace_seconds + 10
    while folder.exists():
        try:
            with locked(folder):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def note_flow_run(record: TrainRecord, flow_run_id: str | None, url: str | None) -> TrainRecord:
    """Link the record and the MLflow run to the Prefect flow run that works on it."""
    if flow_run_id is None:
        return record
    client = tracking.mlflow_client()
    client.set_tag(record.run_id, "tuneline.prefect_flow_run", flow_run_id)
    if url:
        client.set_tag(record.run_id, "tuneline.prefect_url", url)
        note = f"{record.config.description}\n\n[Prefect flow run]({url})"
        client.set_tag(record.run_id, "mlflow.note.content", note.strip())
    earlier = [each for each in (*record.earlier_flow_runs, record.flow_run_id) if each not in (None, flow_run_id)]
    return update_train(record.id, flow_run_id=flow_run_id, earlier_flow_runs=earlier)


def train_of_flow_run(flow_run_id: str) -> TrainRecord | None:
    """The train that a Prefect flow run has begun or taken up, the newest one; None if it has none on this host."""
    found = [record for record in list_trains() if flow_run_id in (record.flow_run_id, *record.earlier_flow_runs)]
    return found[-1] if found else None


def fetch_base(record: TrainRecord, on_events: EventHandler = lambda events: None) -> TrainRecord:
    """Bring the base model to this host."""
    name, path = models.base_folder(record.config.base_model, load_settings(), on_events)
    client, code = tracking.mlflow_client(), code_record(path)
    client.set_tag(record.run_id, "tuneline.base", name)
    if code is not None:
        client.set_tag(record.run_id, "tuneline.remote_code", f"{code.digest}: {', '.join(code.files)}")
    config = record.config
    if config.template_date is None and prints_date(path):
        # Fixed once: the run may go on, or be repeated, on another day.
        config = config.model_copy(update={"template_date": record.template_date})
    return update_train(record.id, config=config, base=name, base_path=path, remote_code=code)


def prepare_datasets(record: TrainRecord) -> TrainRecord:
    """Validate and store what the train reads: training, validation and evaluation rows, each a version."""
    config = record.config
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    versions = {field: _resolve(config, field, columns) for field in DATASETS if getattr(config, field) is not None}
    folder = train_folder(record.id)
    if config.validation_split is not None:
        version, share = versions["dataset"], config.validation_split
        train_rows, validation_rows = folder / "train_rows.jsonl", folder / "validation_rows.jsonl"
        write_split(version, share, config.hyperparameters.seed, train_rows, validation_rows)
    references = {field: version.reference for field, version in versions.items()}
    warnings: list[str] = []
    if record.dataset is None:
        tracking.log_versions(record.run_id, references)
        for field, version in versions.items():
            context = {"dataset": "training"}.get(field, field.removesuffix("_dataset"))
            tracking.log_dataset(record.run_id, version, context)
        reports, warnings = describe_datasets(versions, record.base, record.base_path)
        for field, report in reports.items():
            files = write_report(folder, field, versions[field].reference, report)
            tracking.log_files(record.run_id, files, "datasets")
    return update_train(record.id, **references, warnings=[*record.warnings, *warnings])


def _resolve(config: TrainConfig, field: str, columns: Columns) -> DatasetVersion:
    return resolve_dataset(
        getattr(config, field),
        columns=columns,
        shape=config.dataset_shape,
        allow_refused=config.allow_refused_rows,
        wanted=wanted_rows(find_method(config.method), field),
    )


def take_gpus(record: TrainRecord, on_wait: Callable[[str], None]) -> TrainRecord:
    """Hold the GPUs the train asks for, until `let_go` or `release_slots`; waits for its turn, and the record says so.

    Raises StageCancelled if the train is cancelled while it waits, UserError if the host has fewer GPUs.
    """

    def tell(text: str) -> None:
        update_train(record.id, waiting=text)
        on_wait(text)

    try:
        devices = take_slots(record.id, wanted_gpus(record.config), record.queue, tell)
    except Withdrawn as withdrawn:
        raise StageCancelled from withdrawn
    finally:
        record = update_train(record.id, waiting=None)
    return update_train(record.id, gpus=devices)


def training_rows(record: TrainRecord) -> tuple[Path, Path | None]:
    """The files of the training and of the validation rows."""
    folder = train_folder(record.id)
    if record.config.validation_split is not None:
        return folder / "train_rows.jsonl", folder / "validation_rows.jsonl"
    train = find_dataset(str(record.dataset)).path
    validation = find_dataset(record.validation_dataset).path if record.validation_dataset else None
    return train, validation


def train_model(
    record: TrainRecord,
    on_events: EventHandler,
    monitor: Callable[[str], AbstractContextManager[object]] = lambda run_id: nullcontext(),
) -> TrainRecord:
    """Run the training stage, or go on with it from its newest whole checkpoint; a finished one is not repeated.

    The curves go to MLflow while it runs. Raises UserError, StageFailed, StageCancelled.
    """
    folder = train_folder(record.id) / "training"
    if (folder / "done").exists():
        return _keep_outcome(record)
    checkpoints = contract.complete_checkpoints(folder / "checkpoints")
    resume = checkpoints[-1] if checkpoints else None
    if resume is None and folder.exists():
        # The events stay: they say which points of the curves MLflow has already.
        with locked(folder):  # another process may be training in it at this moment
            (folder / "samples.jsonl").unlink(missing_ok=True)
    method = find_method(record.config.method)
    job = _training_job(record, folder, resume)
    forwarder = tracking.CurveForwarder(record.run_id, folder)

    def follow(events: list[dict[str, Any]]) -> None:
        note_resolved(record, events)
        on_events([*events, *forwarder.news()])

    python, file = method.stage_python("training"), method.stage_file("training")
    write_text(folder / _NOT_KEPT, "the stage has not ended yet\n")
    try:
        with monitor(record.run_id), forwarder.running():
            how = launcher(record.config, folder, on_gpus=bool(record.gpus))
            run_stage(folder, job, python, file, load_settings().grace_seconds, follow, how)
        write_text(folder / "done", "")
    finally:
        keep_files(record)
    return _keep_outcome(record)


def note_resolved(record: TrainRecord, events: Sequence[Mapping[str, Any]]) -> None:
    """Record what parameters given as `auto` became, in the train's record and as tags `tuneline.resolved.NAME`."""
    found = {
        event["name"]: Resolution(value=event["value"], origin=event["origin"], reason=event["reason"])
        for event in events
        if event.get("type") == "resolved"
    }
    if not found:
        return
    update_train(record.id, resolved={**load_train(record.id).resolved, **found})
    try:
        for name, each in found.items():
            tag = f"{each.value} ({each.origin}: {each.reason})"
            tracking.mlflow_client().set_tag(record.run_id, f"tuneline.resolved.{name}", tag)
    except Exception as error:  # the tracking store is away: the record has it
        logging.getLogger(__name__).warning("MLflow does not know what auto became in %s: %s", record.id, error)


def _keep_outcome(record: TrainRecord) -> TrainRecord:
    """Record how a finished training stage went, by what it left; done again after a kill, nothing is missing."""
    folder = train_folder(record.id) / "training"
    result = json.loads((folder / contract.RESULT_FILE).read_text(encoding="utf-8"))
    outcome = {name: float(result[name]) for name in ("steps", "seconds", "loss") if name in result}
    best = {name: float(value) for name, value in result.items() if name.startswith(("best_", "last_eval_"))}
    stopped = result.get("stopped")
    sync_curves(record)
    if {**outcome, **best} != record.outcome:
        tracking.log_scores(record.run_id, {f"train_{name}": value for name, value in outcome.items()} | best)
        if stopped is not None:
            tracking.mlflow_client().set_tag(record.run_id, "tuneline.stopped", stopped)
    return update_train(record.id, outcome={**outcome, **best}, stopped=stopped)


def _training_job(record: TrainRecord, folder: Path, resume: Path | None) -> StageJob:
    train_rows, validation_rows = training_rows(record)
    return StageJob(
        stage="training",
        parameters=find_method(record.config.method).job_parameters(record.config),
        inputs={
            "base_model": str(record.base_path),
            "train_rows": str(train_rows),
            "validation_rows": str(validation_rows) if validation_rows else None,
            "date": record.template_date.isoformat(),
            **(given := method_inputs(record.config)),
            "remote_code": allowed_digests([Path(str(record.base_path)), *model_folders(given)]),
        },
        output=folder / "output",
        resume_from=resume,
        seed=record.config.hyperparameters.seed,
    )


def checkpoint_job(record: TrainRecord, step: int, folder: Path) -> StageJob:
    """The job of a training stage that is to make its product of a checkpoint, without a further step."""
    checkpoint = train_folder(record.id) / "training" / "checkpoints" / f"checkpoint-{step}"
    job = _training_job(record, folder, checkpoint)
    return job.model_copy(update={"inputs": {**job.inputs, "save_checkpoint": True}})


def sync_curves(record: TrainRecord) -> bool:
    """Send the curves that MLflow has not confirmed yet; True if none are left."""
    folder = train_folder(record.id) / "training"
    if not (folder / contract.EVENTS_FILE).exists():
        return True
    return tracking.CurveForwarder(record.run_id, folder).forward()


def keep_files(record: TrainRecord) -> None:
    """Keep the log, the curves as a picture, the files the stage reported and the environment with the run."""
    folder = train_folder(record.id) / "training"
    events = EventTail(folder / contract.EVENTS_FILE).read()
    picture = folder / "curves.png"
    draw_curves(events, picture, record.id)
    reported = [Path(event["path"]) for event in events if event["type"] == "artifact"]
    inside = {path for path in reported if folder.resolve() in path.resolve().parents}
    lock = folder / "environment.txt"
    with contextlib.suppress(UserError):  # the method or its environment is gone since: what was written then stays
        write_text(lock, environment_lock(find_method(record.config.method).stage_python("training")))
    try:
        tracking.log_files(record.run_id, [folder / contract.LOG_FILE, picture, lock, *sorted(inside)], "training")
    except Exception as error:  # the tracking store is away: the files stay where they are until it can be told
        write_text(folder / _NOT_KEPT, f"{type(error).__name__}: {error}\n")
        return
    (folder / _NOT_KEPT).unlink(missing_ok=True)


def environment_lock(python: Path = Path(sys.executable)) -> str:
    """Every installed distribution of an interpreter with its version, one a line. Raises UserError."""
    from importlib.metadata import distributions

    if python != Path(sys.executable):
        return "".join(f"{name}=={version}\n" for name, version in sorted(packages_of(python).items()))
    found = {f"{item.metadata['Name']}=={item.version}" for item in distributions() if item.metadata["Name"]}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def register_customized(record: TrainRecord) -> ModelRecord:
    """Put the adapter into the model store and the registry, under the name BASE_TRAIN_YYYYMMDD_xxxx."""
    model = trained_model(record)
    model = model.model_copy(update={"stage": "customized", "path": load_settings().models / model.name})
    if (model.path / models.RECORD_FILE).exists():
        model = read_record(model.path / models.RECORD_FILE, ModelRecord)
    model = models.publish_model(model, train_folder(record.id) / "training" / "output")
    update_train(record.id, model=model.name)
    return model


def trained_model(record: TrainRecord) -> ModelRecord:
    """What training has left in the train's folder, adapter or full weights, as a model."""
    if record.base is None or record.base_path is None:
        raise UserError("this train has not begun to train", field="train", value=record.id)
    # The name of a folder has 255 bytes at most, and more is added: _s_xxxx, _d_xxxx, the quantization.
    base = record.base.encode()[:60].decode(errors="ignore")
    return ModelRecord(
        name=f"{base}_{record.id}",
        stage="trained",
        path=train_folder(record.id) / "training" / "output",
        line=record.config.name,
        base=record.base,
        base_path=record.base_path,
        method=record.config.method,
        adapter=_left_adapter(record),
        dtype=record.config.hyperparameters.dtype,
        parent=record.base,
        train=record.id,
        step=_product_step(record.outcome),
        run_id=record.run_id,
        dataset=record.dataset,
    )


def _product_step(outcome: Mapping[str, float]) -> int | None:
    step = outcome.get("best_step", outcome.get("steps"))
    return None if step is None else int(step)


def _left_adapter(record: TrainRecord) -> bool:
    """Whether training has left an adapter, by its own word; before it has ended, by what was asked for."""
    file = train_folder(record.id) / "training" / contract.RESULT_FILE
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return bool(result.get("adapter", record.config.hyperparameters.tuning != "full"))


def save_complete(model: ModelRecord, on_events: EventHandler) -> ModelRecord:
    """Run the saving stage: a self-contained model, proved equal to what was trained, named CUSTOMIZED_s_xxxx.

    A train that has its complete model already keeps it. Raises UserError, StageFailed, StageCancelled.
    """
    settings = load_settings()
    folder = settings.root / "saves" / model.name
    saved = saved_complete(model)
    if saved is not None:
        return _keep_complete(saved, folder)
    name_file = folder / "name"
    name = name_file.read_text() if name_file.exists() else f"{model.name}_s_{secrets.token_hex(2)}"
    target = settings.models / name
    method = find_method(model.method)
    write_text(name_file, name)
    _wait_for_stage(folder)
    shutil.rmtree(folder / "output", ignore_errors=True)
    job = StageJob(
        stage="saving",
        parameters={"dtype": model.dtype},
        inputs={
            "base_model": str(model.base_path),
            "trained": str(model.path),
            "adapter": model.adapter,
            "remote_code": allowed_digests([model.base_path, model.path]),
        },
        output=folder / "output",
        seed=0,
    )
    python, file = method.stage_python("saving"), method.stage_file("saving")
    with borrowing_slot(f"save {model.name}", on_events):
        result = run_stage(folder, job, python, file, settings.grace_seconds, on_events)
    complete = model.model_copy(
        update={
            "name": name,
            "stage": "complete",
            "path": target,
            "adapter": False,
            "dtype": result["dtype"],
            "parent": model.name,
            "created": now(),
            "registered_version": None,
            "verification": result["verification"],
        }
    )
    return _keep_complete(complete, folder)


def saved_complete(model: ModelRecord) -> ModelRecord | None:
    """The complete model that was made of a model; None before it is in the store."""
    settings = load_settings()
    name_file = settings.root / "saves" / model.name / "name"
    record = settings.models / name_file.read_text() / models.RECORD_FILE if name_file.exists() else None
    return read_record(record, ModelRecord) if record is not None and record.exists() else None


def _keep_complete(complete: ModelRecord, folder: Path) -> ModelRecord:
    """Publish a complete model and record its proof; done again after a kill, nothing is missing."""
    new = complete.registered_version is None
    complete = models.publish_model(complete, folder / "output")
    if complete.run_id is not None and new:
        proof = {f"merge_{name}": value for name, value in complete.verification.items()}
        tracking.log_scores(complete.run_id, proof, models.logged_model_id(complete))
    if complete.train is None or complete.from_checkpoint:
        return complete
    if (train_folder(complete.train) / RECORD_FILE).exists():
        update_train(complete.train, model=complete.name)
    return complete


def evaluate_model(record: TrainRecord, model: ModelRecord, which: str, on_events: EventHandler) -> TrainRecord:
    """Score a model on the train's evaluation rows; `which` is `base` or `tuned`. Done once for each.

    Without an evaluation dataset, or the stage of the method that it takes, nothing is scored.
    """
    record = load_train(record.id)
    if record.evaluation_dataset is None or which in record.evaluation:
        return record
    if inference_stage(model) not in find_method(model.method).stages:
        return record
    registered = model if model.registered_version is not None else None
    version = find_dataset(record.evaluation_dataset)
    if version.kind not in TEXT_KINDS:
        return _measure_model(record, model, registered, which, version, on_events)
    generation = evaluation_generation(record)
    options = scoring_options(record.config)
    outcome = evaluate(model, version, generation, record.config.evaluation_samples, on_events, options)
    keep_evaluation(record.run_id, outcome, which, models.logged_model_id(registered) if registered else None)
    write_record(kept_evaluation(train_folder(record.id), which), outcome)
    if registered is not None:
        models.note_evaluation(registered, outcome.figures)
    scores = {**record.evaluation, which: outcome.figures}
    return update_train(record.id, evaluation=scores)


def evaluation_generation(record: TrainRecord) -> Generation:
    """How the models of a train answer rows: greedily, with the chat template as in its training."""
    config = record.config
    given: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "template_date": record.template_date}
    if "thinking" in find_method(config.method).hyperparameter_names:
        thinking = config.hyperparameters.thinking
        if thinking == "auto":
            thinking = "on" if rows_have_thoughts(training_rows(record)[0]) else "off"
        given |= {"thinking": thinking, "chat_template_kwargs": config.hyperparameters.chat_template_kwargs}
    return Generation(**given)


def _measure_model(
    record: TrainRecord,
    model: ModelRecord,
    registered: ModelRecord | None,
    which: str,
    version: DatasetVersion,
    on_events: EventHandler,
) -> TrainRecord:
    """Measure a model on rows that no text answers: its method's own figures."""
    outcome = measure(model, version, record.config.evaluation_samples, on_events)
    keep_measurement(record.run_id, outcome, which, models.logged_model_id(registered) if registered else None)
    if registered is not None:
        models.note_evaluation(registered, outcome.figures)
    return update_train(record.id, evaluation={**record.evaluation, which: outcome.figures})


def base_as_model(record: TrainRecord) -> ModelRecord:
    """The base model of a train, to be asked for answers in the train's own dtype."""
    return trained_model(record).model_copy(
        update={
            "name": record.base,
            "stage": "base",
            "path": record.base_path,
            "adapter": False,
            "parent": None,
        }
    )


def close_train(record: TrainRecord, status: TrainStatus, reason: str | None = None) -> TrainRecord:
    """Say how a train ended, in its record and in MLflow."""
    record = update_train(record.id, status=status, reason=reason, ended=now())
    write_text(_untold(record.id), status)
    _tell_end(record)
    let_go(record.id)
    return record


def _untold(train_id: str) -> Path:
    """Marks a train of whose end MLflow does not know all yet."""
    return train_folder(train_id) / "untold"


def _tell_end(record: TrainRecord) -> None:
    """Tell MLflow how the train ended; while it is away, the mark stays and `settle_trains` does it later."""
    if not sync_curves(record):
        return
    try:
        if (train_folder(record.id) / "training" / _NOT_KEPT).exists():
            keep_files(record)
        if record.dataset is None:  # it ended before its datasets were versions: what was asked for is shown then
            tracking.log_parameters(record.run_id, tracking.flatten(record.config))
        if record.reason:
            tracking.mlflow_client().set_tag(record.run_id, "tuneline.reason", record.reason[:5000])
        page = as_html(report(record), record.id)
        tracking.mlflow_client().log_text(record.run_id, page, "report.html")
        tracking.end_run(record.run_id, record.status)
    except Exception as error:  # how the train ended stands in its record, and must not be hidden by this
        logging.getLogger(__name__).warning("MLflow could not be told how %s ended: %s", record.id, error)
        return
    _untold(record.id).unlink(missing_ok=True)


def report(record: TrainRecord) -> str:
    """The page of the train, as Markdown, with links to its run and to a comparison with the train it was copied from.

    Without an answer from MLflow it has no links.
    """
    links = {}
    with contextlib.suppress(Exception):
        links = _links(record)
    return train_report(record, current_status(record), train_folder(record.id), links)


def _links(record: TrainRecord) -> dict[str, str]:
    page = tracking.run_page(record.run_id)
    links = {"MLflow run: curves and files": page} if page else {}
    for train_id in copied_trains(record.origins.values()):
        with contextlib.suppress(UserError):  # deleted since, or on another host
            compared = tracking.compare_page([load_train(train_id).run_id, record.run_id])
            links |= {f"Compare with {train_id}": compared} if compared else {}
    table = tracking.trains_page()
    return links | ({"All trains": table} if table else {})


def cancel_train(record: TrainRecord) -> None:
    """Ask the train to save a checkpoint and stop, in whatever stage it is; a waiting one gives up its place as well.

    Raises UserError if it does not run.
    """
    if current_status(record) != "running":
        raise UserError(
            "this train is not running", field="train", value=record.id, mend="`tuneline status` shows those that are"
        )
    if not withdraw_ticket(record.id):
        cancelling.ask_to_stop(train_folder(record.id))

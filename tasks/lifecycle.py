"""The Prefect tasks the flows are made of: a few lines each over the plain functions of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.train import TrainConfig
from tasks import deploying, models, trains
from tasks.progress import showing
from tasks.stages import StageCancelled, StageKilled


def _was_killed(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what was ended from outside; a mistake or a cancel would only repeat itself."""
    return isinstance(state.result(raise_on_failure=False), StageKilled)


@task(name="open train", cache_policy=NO_CACHE)
def open_train(train: TrainConfig | None, origins: dict[str, str] | None, resume: str | None) -> TrainRecord:
    """Begin a train, or take one up again; returns its record."""
    if (train is None) == (resume is None):
        raise UserError("give either the configuration of a train or the id of one to resume", field="train")
    if resume is not None:
        record = trains.reopen_train(trains.load_train(resume))
    else:
        assert train is not None  # noqa: S101 - said above, for the type checker
        record = trains.open_train(train, origins or {}, [])
    return trains.note_flow_run(record, *_flow_run())


def _flow_run() -> tuple[str | None, str | None]:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None, None
    from prefect.settings import PREFECT_UI_URL

    flow_run_id = str(context.flow_run.id)
    url = PREFECT_UI_URL.value()
    return flow_run_id, f"{url}/runs/flow-run/{flow_run_id}" if url else None


@contextmanager
def closing(train_id: str) -> Iterator[None]:
    """Record how the train ended, whichever way the block is left."""
    try:
        yield
    except StageCancelled:
        trains.close_train(trains.load_train(train_id), "cancelled", "asked to stop")
        raise
    except KeyboardInterrupt:
        trains.close_train(trains.load_train(train_id), "cancelled", "interrupted in the terminal")
        raise
    except BaseException as error:
        trains.close_train(trains.load_train(train_id), "failed", str(error))
        raise
    trains.close_train(trains.load_train(train_id), "completed")


@task(
    name="fetch base model",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_was_killed,
    cache_policy=NO_CACHE,
)
def fetch_base(record: TrainRecord) -> TrainRecord:
    """Bring the base model to this host; returns the record with its folder."""
    return trains.fetch_base(record)


@task(name="prepare datasets", cache_policy=NO_CACHE)
def prepare_datasets(record: TrainRecord) -> TrainRecord:
    """Validate and store the rows; returns the record with the dataset versions."""
    record = trains.prepare_datasets(record)
    get_run_logger().info("dataset %s", record.dataset)
    return record


@task(name="train", retries=2, retry_delay_seconds=5, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def train_model(record: TrainRecord) -> TrainRecord:
    """Run the training stage; a retry goes on from the newest checkpoint. Returns the record with the outcome."""
    with showing("training", "training-progress") as progress:
        return trains.train_model(record, progress.follow, _system_metrics)


def _system_metrics(run_id: str) -> AbstractContextManager[object]:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    @contextmanager
    def monitoring() -> Iterator[None]:
        monitor = SystemMetricsMonitor(run_id, sampling_interval=5, samples_before_logging=1, resume_logging=True)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    return monitoring()


@task(name="register customized model", cache_policy=NO_CACHE)
def register_customized(record: TrainRecord) -> ModelRecord:
    """Put the adapter into the registry; returns the customized model."""
    return trains.register_customized(record)


@task(name="trained weights", cache_policy=NO_CACHE)
def trained_model(record: TrainRecord) -> ModelRecord:
    """What full-parameter training has left, to be saved as a complete model."""
    return trains.trained_model(record)


@task(name="save complete model", retries=1, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def save_complete(model: ModelRecord) -> ModelRecord:
    """Merge and verify; returns the complete model."""
    with showing("saving", "saving-progress") as progress:
        return trains.save_complete(model, progress.follow)


@task(name="evaluate base model", retries=1, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def evaluate_base(record: TrainRecord) -> TrainRecord:
    """Score the base model on the evaluation rows; returns the record with the figures."""
    with showing("evaluating the base", "evaluation-of-base") as progress:
        return trains.evaluate_model(record, trains.base_as_model(record), "base", progress.follow)


@task(name="evaluate tuned model", retries=1, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def evaluate_tuned(record: TrainRecord, model: ModelRecord) -> TrainRecord:
    """Score the fine-tuned model on the same rows; returns the record with the figures."""
    with showing("evaluating the result", "evaluation-of-result") as progress:
        return trains.evaluate_model(record, model, "tuned", progress.follow)


@task(name="reload train", cache_policy=NO_CACHE)
def reload_train(train_id: str) -> TrainRecord:
    """The record of a train as it is now."""
    return trains.load_train(train_id)


@task(name="find model", cache_policy=NO_CACHE)
def find_model(reference: str) -> ModelRecord:
    """The model of a name, alias, train or base."""
    return models.find_model(reference)


@task(name="deploy model", cache_policy=NO_CACHE)
def deploy_model(
    model: ModelRecord, endpoint: str | None, target: str, quantization: str | None, port: int | None
) -> Endpoint:
    """Serve the model, verify it, switch the endpoint to it; returns the endpoint."""
    with showing("deploying", "deployment-progress") as progress:
        return deploying.deploy_model(model, endpoint, target, quantization, port, progress.follow)

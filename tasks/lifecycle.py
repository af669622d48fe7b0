"""The Prefect tasks the flows are made of: a few lines each over the plain functions of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from prefect import Flow, State, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger

from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord, TrainStatus
from configs.resolve import ResolvedTrain
from configs.train import TrainConfig
from deployments.forms import Through, resolve_form
from deployments.guard import guard_embedded_server
from tasks import deploying, models, trains
from tasks.progress import showing
from tasks.stages import StageCancelled, StageKilled


def _was_killed(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what was ended from outside; a mistake or a cancel would only repeat itself."""
    return isinstance(state.result(raise_on_failure=False), StageKilled)


@task(name="open train", cache_policy=NO_CACHE)
def open_train(
    train: TrainConfig | None,
    origins: dict[str, str] | None,
    resume: str | None,
    through: Through,
    endpoint: str | None = None,
) -> TrainRecord:
    """Begin a train that goes as far as `through`, or take one up again; returns its record.

    Without `origins` the configuration comes from a form, and its origins are found out.
    """
    if (train is None) == (resume is None):
        raise UserError("give either the configuration of a train or the id of one to resume", field="train")
    guard_embedded_server()
    for interrupted in trains.settle_trains():
        _crash_flow_run(interrupted)
    if resume is not None:
        record = trains.reopen_train(trains.load_train(resume))
    else:
        assert train is not None  # noqa: S101 - said above, for the type checker
        if origins is None:
            record = _open_from_form(resolve_form(train, through, endpoint))
        else:
            record = trains.open_train(train, origins, [])
    record = trains.note_flow_run(record, *_flow_run())
    _name_flow_run(record)
    _show_overview(record)
    return record


def _open_from_form(resolved: ResolvedTrain) -> TrainRecord:
    for warning in resolved.warnings:
        get_run_logger().warning("%s", warning)
    return trains.open_train(resolved.config, resolved.origins, resolved.warnings)


def _flow_run() -> tuple[str | None, str | None]:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None, None
    from prefect.settings import PREFECT_UI_URL

    flow_run_id = str(context.flow_run.id)
    url = PREFECT_UI_URL.value()
    return flow_run_id, f"{url}/runs/flow-run/{flow_run_id}" if url else None


def _name_flow_run(record: TrainRecord) -> None:
    """Call the flow run by the train's id, and tag it with what one looks it up by."""
    from prefect.client.orchestration import get_client

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    tags = {*context.flow_run.tags, f"train:{record.id}", f"mlflow:{record.run_id}"}
    name = record.id if record.attempts == 1 else f"{record.id} (attempt {record.attempts})"
    with get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, name=name, tags=tags)


def _crash_flow_run(record: TrainRecord) -> None:
    """Tell Prefect that the flow run of an interrupted train is over: its process could not."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    if record.flow_run_id is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.set_flow_run_state(UUID(record.flow_run_id), Crashed(message=record.reason), force=True)
        except ObjectNotFound:
            get_run_logger().info("flow run %s of %s is on another Prefect server", record.flow_run_id, record.id)


def _show_overview(record: TrainRecord) -> None:
    """Put the train's overview among the flow run's artifacts; what Prefect refuses is logged and does no harm."""
    from prefect.artifacts import create_markdown_artifact

    try:
        create_markdown_artifact(trains.overview(record), key="train-overview", description=f"Train {record.id}")
    except Exception as error:  # the Prefect server is away: the train has ended all the same
        get_run_logger().warning("overview not shown: %s", error)


@contextmanager
def closing(train_id: str) -> Iterator[None]:
    """Record how the train ended, whichever way the block is left."""
    try:
        yield
    except StageCancelled:
        _close(train_id, "cancelled", "asked to stop")
        raise
    except KeyboardInterrupt:
        _close(train_id, "cancelled", "interrupted in the terminal")
        raise
    except TerminationSignal:
        _close(train_id, "cancelled", "the process that ran it was asked to end")
        raise
    except BaseException as error:
        _close(train_id, "failed", str(error) or type(error).__name__)
        raise
    _close(train_id, "completed")


def show_cancelled(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Flow hook: a train that was asked to stop by `tuneline trains cancel` is Cancelled on the page, not Failed."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    if isinstance(state.result(raise_on_failure=False), StageCancelled):
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelled(message="asked to stop"), force=True)


def _close(train_id: str, status: TrainStatus, reason: str | None = None) -> None:
    _show_overview(trains.close_train(trains.load_train(train_id), status, reason))


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
def evaluate_tuned(record: TrainRecord, model: ModelRecord) -> ModelRecord:
    """Score the fine-tuned model on the same rows; returns the model with the figures."""
    with showing("evaluating the result", "evaluation-of-result") as progress:
        trains.evaluate_model(record, model, "tuned", progress.follow)
    return models.find_model(model.name)


@task(name="find model", cache_policy=NO_CACHE)
def find_model(reference: str) -> ModelRecord:
    """The model of a name, alias, train or base."""
    guard_embedded_server()
    return models.find_model(reference)


@task(name="deploy model", cache_policy=NO_CACHE)
def deploy_model(
    model: ModelRecord, endpoint: str | None, target: str, quantization: str | None, port: int | None
) -> Endpoint:
    """Serve the model, verify it, switch the endpoint to it; returns the endpoint."""
    with showing("deploying", "deployment-progress") as progress:
        return deploying.deploy_model(model, endpoint, target, quantization, port, progress.follow)

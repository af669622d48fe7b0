"""The Prefect tasks the flows are made of: a few lines each over the plain functions of this folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

from prefect import Flow, State, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger

from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.profiles import RecordedProfile
from configs.records import ModelRecord, QueueName, ServedAs, SweepPlace, TrainRecord, TrainStatus
from configs.resolve import recorded_profile
from configs.train import TrainConfig
from deployments import alerts
from deployments.forms import Through, mark_copied, resolve_form
from deployments.guard import guard_embedded_server
from methods.registry import find_method
from tasks import cancelling, deploying, models, resuming, tracking, train_checkpoints, trains
from tasks.gpus import release_slots
from tasks.progress import TerminalLine, showing
from tasks.stages import StageCancelled, StageKilled

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_REPORT = "train-report"
_OWN_TAGS = ("train:", "mlflow:", "alert:")
_ASKED_TO_STOP = "asked to stop"


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
    queue: QueueName | None = None,
    served_as: ServedAs | None = None,
    profile: str | None = None,
    sweep: SweepPlace | None = None,
) -> TrainRecord:
    """Begin a train that goes as far as `through`, or take one up again; returns its record.

    A flow run that is run again (*Retry* on the page) takes up the train that it has begun.

    Without `origins` the configuration comes from a form, with the `profile` that was picked there, and its origins are
    found out. `queue` says who gets a GPU
    first; not given: the work queue of the flow run, or that of an earlier attempt. `sweep` says which train of a sweep
    it is.
    """
    if (train is None) == (resume is None):
        raise UserError("give either the configuration of a train or the id of one to resume", field="train")
    settle()
    begun = trains.load_train(resume) if resume is not None else _begun_by_this_flow_run(train)
    if begun is None and train is not None:
        alerts.check_subscriptions(train.alerts)
        _subscribe(train)
    if begun is not None:
        record = trains.reopen_train(begun)
    else:
        assert train is not None  # noqa: S101 - said above, for the type checker
        if through == "deployed":  # refused here, not when everything is trained
            deploying.check_target(find_method(train.method), served_as.target if served_as else None)
        if origins is None:
            record = _open_from_form(train, through, endpoint, profile)
        else:
            record = trains.open_train(train, origins, [], sweep)
        record = trains.update_train(record.id, served_as=served_as or ServedAs())
    record = trains.note_flow_run(record, *_flow_run())
    record = trains.update_train(record.id, queue=queue or _work_queue() or record.queue)
    _name_flow_run(record)
    _show_report(record)
    return record


def settle() -> list[TrainRecord]:
    """Close the trains whose process was killed, and their flow runs; returns them."""
    guard_embedded_server()
    settled = trains.settle_trains()
    for record in settled:
        _crash_flow_run(record)
    return settled


def _begun_by_this_flow_run(train: TrainConfig | None) -> TrainRecord | None:
    """The train that an earlier attempt of this flow run has begun; by its name, as a flow may train several."""
    flow_run_id, _ = _flow_run()
    begun = trains.train_of_flow_run(flow_run_id) if flow_run_id is not None else None
    return begun if begun is not None and train is not None and begun.config.name == train.name else None


@task(name="decide after a crash", cache_policy=NO_CACHE)
def decide_after_crash(flow_run_id: str) -> resuming.CrashDecision:
    """Whether the train of a crashed flow run is to be taken up again; the reason is recorded either way."""
    settle()
    decision = resuming.decide_after_crash(flow_run_id)
    if decision.alive:
        _show_alive(flow_run_id)
    return decision


@task(name="find train", cache_policy=NO_CACHE)
def find_train(reference: str) -> TrainRecord:
    """The train of an id, or the newest one of a name."""
    return trains.load_train(reference)


def _open_from_form(train: TrainConfig, through: Through, endpoint: str | None, profile: str | None) -> TrainRecord:
    copied = _copied_train()
    given: str | RecordedProfile | None = profile
    if profile is not None and copied is not None:
        # The copy is the same train, although the profile may have other values by now.
        given = recorded_profile(profile, copied.config, copied.origins) or profile
    resolved = resolve_form(train, through, endpoint, given)
    if copied is not None:
        resolved = mark_copied(resolved, copied.id, copied.config)
    for warning in resolved.warnings:
        get_run_logger().warning("%s", warning)
    return trains.open_train(resolved.config, resolved.origins, resolved.warnings)


def _copied_train() -> TrainRecord | None:
    """The train whose flow run was copied on the page: *Copy to new run* copies the tags as well."""
    context = FlowRunContext.get()
    tags = context.flow_run.tags if context is not None and context.flow_run is not None else []
    for tag in tags:
        if tag.startswith("train:"):
            with suppress(UserError):  # deleted since, or on another host
                return trains.load_train(tag.removeprefix("train:"))
    return None


def _flow_run() -> tuple[str | None, str | None]:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None, None
    from prefect.settings import PREFECT_UI_URL

    flow_run_id = str(context.flow_run.id)
    url = PREFECT_UI_URL.value()
    # The page that a browser opens by itself: without /v2 the link would lead to the older one.
    return flow_run_id, f"{url}/v2/runs/flow-run/{flow_run_id}" if url else None


def _work_queue() -> QueueName | None:
    """The work queue that the flow run was taken from, if it is one of ours."""
    context = FlowRunContext.get()
    named = context.flow_run.work_queue_name if context is not None and context.flow_run is not None else None
    return next((queue for queue in get_args(QueueName) if queue == named), None)


def _name_flow_run(record: TrainRecord) -> None:
    """Call the flow run by the train's id, and tag it with what one looks it up by."""
    from prefect.client.orchestration import get_client

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    # A run that was copied on the page has the tags of the other train as well.
    others = {tag for tag in context.flow_run.tags if not tag.startswith(_OWN_TAGS)}
    own = {f"train:{record.id}", f"mlflow:{record.run_id}"}
    tags = others | own | alerts.run_tags(record.config.alerts)
    name = record.id if record.attempts == 1 else f"{record.id} (attempt {record.attempts})"
    with get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, name=name, tags=tags)
        if record.config.alerts:
            labels = alerts.run_labels(record, _flow_run()[1], tracking.run_page(record.run_id))
            client.update_flow_run_labels(context.flow_run.id, labels)


def _subscribe(train: TrainConfig) -> None:
    """Tag the flow run for the subscribers before anything can fail: they are told of that too."""
    from prefect.client.orchestration import get_client

    if train.alerts and not alerts.server_sends():
        get_run_logger().warning("no Prefect server stands by: if this process is killed, the alerts are sent late")
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or not train.alerts:
        return
    tags = alerts.without_alert_tags(context.flow_run.tags) | alerts.run_tags(train.alerts)
    with get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, tags=tags)


def _crash_flow_run(record: TrainRecord) -> None:
    """Tell Prefect that the flow run of an interrupted train is over, if nobody has yet: its process could not."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    alerts.take_over_crashed(record)
    if record.flow_run_id is None:
        return
    ended = Cancelled if record.status == "cancelled" else Crashed
    state: State[Any] = ended(message=record.reason)
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(record.flow_run_id))
            # Said once: every report starts the automations again.
            if found.state is None or not found.state.is_final():
                client.set_flow_run_state(found.id, state, force=True)
        except ObjectNotFound:
            logging.getLogger(__name__).warning(
                "flow run %s of %s is on another Prefect server", record.flow_run_id, record.id
            )


def _show_alive(flow_run_id: str) -> None:
    """Take back that a flow run has crashed: the server heard nothing of it for a while, and its train goes on."""
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(flow_run_id))
        if found.state is None or not found.state.is_crashed():
            return
        client.set_flow_run_state(found.id, Running(message="its process is alive"), force=True)
        record = trains.train_of_flow_run(flow_run_id)
        if record is None or trains.current_status(record) != "running":
            # It has ended in this very moment, and what it said of itself must not be lost.
            client.set_flow_run_state(found.id, found.state, force=True)


def _show_report(record: TrainRecord) -> None:
    """Put the train's page among the flow run's artifacts: one artifact, which the end of the train rewrites.

    What Prefect refuses is logged and does no harm.
    """
    from prefect.artifacts import create_markdown_artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactUpdate

    page, about = trains.report(record), f"Train {record.id}: {record.status}"
    try:
        with get_client(sync_client=True) as client:
            shown = _shown_report(client)
            if shown is None:
                create_markdown_artifact(page, key=_REPORT, description=about)
            else:
                client.update_artifact(shown, ArtifactUpdate(data=page, description=about))
    except Exception as error:  # the Prefect server is away: the train has ended all the same
        get_run_logger().warning("the page of the train is not shown: %s", error)


def _shown_report(client: SyncPrefectClient) -> UUID | None:
    """The artifact that this flow run has its page in already."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    of_run = ArtifactFilterFlowRunId(any_=[context.flow_run.id])
    wanted = ArtifactFilter(flow_run_id=of_run, key=ArtifactFilterKey(any_=[_REPORT]))
    return next((artifact.id for artifact in client.read_artifacts(artifact_filter=wanted)), None)


@contextmanager
def closing(train_id: str) -> Iterator[None]:
    """Record how the train ended, whichever way the block is left."""
    try:
        yield
    except StageCancelled:
        _close(train_id, "cancelled", _ASKED_TO_STOP)
        raise
    except KeyboardInterrupt:
        _close(train_id, "cancelled", "interrupted in the terminal")
        raise
    except TerminationSignal as ended:
        if cancelling.was_asked(trains.train_folder(train_id)):
            _close(train_id, "cancelled", _ASKED_TO_STOP)
            raise StageCancelled from ended
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


def record_cancelled(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Flow hook: Prefect kills a cancelled flow after 30 s, which then cannot say itself how its train has ended."""
    settle()


def _close(train_id: str, status: TrainStatus, reason: str | None = None) -> None:
    record = trains.close_train(trains.load_train(train_id), status, reason)
    _show_report(record)
    for problem in alerts.prepare_end(record, asked_to_stop=reason == _ASKED_TO_STOP):
        get_run_logger().warning("%s", problem)
        if TerminalLine.on:  # its terminal does not show the log
            print(f"warning: {problem}", file=sys.stderr)


@task(
    name="fetch base model",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_was_killed,
    cache_policy=NO_CACHE,
)
def fetch_base(record: TrainRecord) -> TrainRecord:
    """Bring the base model to this host; returns the record with its folder."""
    with showing("fetching the base", "base-model-progress") as progress:
        return trains.fetch_base(record, progress.follow)


@task(name="prepare datasets", cache_policy=NO_CACHE)
def prepare_datasets(record: TrainRecord) -> TrainRecord:
    """Validate and store the rows; returns the record with the dataset versions."""
    known = len(record.warnings)
    record = trains.prepare_datasets(record)
    get_run_logger().info("dataset %s", record.dataset)
    for warning in record.warnings[known:]:
        get_run_logger().warning("%s", warning)
    _show_datasets(record)
    return record


def _show_datasets(record: TrainRecord) -> None:
    """Put the reports of the datasets among the flow run's artifacts."""
    from prefect.artifacts import create_markdown_artifact

    for page in sorted(trains.train_folder(record.id).glob("*dataset_report.md")):
        name = page.stem.removesuffix("_report").replace("_", "-")
        try:
            create_markdown_artifact(
                page.read_text(encoding="utf-8"), key=f"{name}-report", description=f"{name} of train {record.id}"
            )
        except Exception as error:  # the Prefect server is away: the train goes on without it
            get_run_logger().warning("the report of the %s is not shown: %s", name, error)


@task(name="wait for GPUs", cache_policy=NO_CACHE)
def take_gpus(record: TrainRecord) -> TrainRecord:
    """Hold the GPUs that the train asks for, until it ends; waits for its turn. Returns the record with them."""
    with showing("GPUs", "gpu-queue") as progress:
        record = trains.take_gpus(record, progress.wait)
        progress.wait_over(f"GPU {', '.join(record.gpus)}" if record.gpus else "it runs without a GPU")
    return record


def release_gpus(record: TrainRecord) -> None:
    """Let the next train have the GPUs: its model is made, and serving holds none."""
    release_slots(record.id)


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


@task(name="save checkpoint", retries=1, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def save_checkpoint(reference: str, checkpoint: str) -> ModelRecord:
    """Make the model of an earlier checkpoint of a train; returns its adapter, or its full weights to be saved."""
    guard_embedded_server()
    record = train_checkpoints.train_of(reference)
    step = train_checkpoints.chosen_step(record, checkpoint)
    with showing("checkpoint", "checkpoint-progress") as progress:
        return train_checkpoints.save_checkpoint(record, step, progress.follow)


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
    model: ModelRecord, endpoint: str | None, target: str | None, quantization: str | None, port: int | None
) -> Endpoint:
    """Serve the model, verify it, switch the endpoint to it; returns the endpoint."""
    with showing("deploying", "deployment-progress") as progress:
        return deploying.deploy_model(model, endpoint, target, quantization, port, progress.follow)

"""The Prefect tasks of the flow `retrain`: a few lines each over `tasks.retraining`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from configs.records import ModelRecord, TrainRecord
from configs.retraining import RetrainAttempt, RetrainOutcome, RetrainPolicy
from deployments.guard import guard_embedded_server
from tasks import lifecycle, models, retraining
from tasks.deploying import endpoint_name
from tasks.progress import showing
from tasks.stages import StageCancelled, StageKilled


def _was_killed(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageKilled)


@task(name="read policy", cache_policy=NO_CACHE)
def read_policy(line: str, given: dict[str, Any]) -> RetrainPolicy:
    """The line's policy, with what this run was given instead."""
    guard_embedded_server()
    return retraining.resolve_policy(line, given)


@task(name="look for new rows", cache_policy=NO_CACHE)
def begin(policy: RetrainPolicy, force: bool) -> RetrainAttempt | str:
    """The attempt to work on, or why there is nothing to do."""
    begun = retraining.begin(policy, force=force)
    if isinstance(begun, RetrainAttempt):
        get_run_logger().info("%s is trained again on %s, to beat %s", policy.line, begun.dataset, begun.champion)
        if begun.policy != policy:
            get_run_logger().warning("an earlier attempt goes on as it began, with the policy of %s", begun.began)
    return begun


@contextmanager
def recording(line: str) -> Iterator[None]:
    """Record an attempt that fails; one that is cancelled or killed stays open, and the next run goes on with it."""
    try:
        yield
    except StageCancelled:
        raise
    except Exception as error:
        _record_failure(line, error)
        raise


def _record_failure(line: str, error: Exception) -> None:
    attempt = retraining.load_attempt(line)
    if attempt is None:
        return
    reason = str(error) or type(error).__name__
    try:
        _show(retraining.conclude(attempt, "failed" if attempt.model is None else "not_deployed", reason))
    except Exception as second:  # the tracking store is away: the attempt stays open, and its error is not hidden
        get_run_logger().warning("the failure could not be recorded: %s", second)


def open_challenger(attempt: RetrainAttempt) -> TrainRecord:
    """Begin the challenger's train, or take up the one that a killed attempt has begun."""
    resolved = retraining.challenger_config(attempt)
    through = resolved.config.through or "customized"
    if attempt.train is not None:
        return lifecycle.open_train(None, None, attempt.train, through)
    record = lifecycle.open_train(resolved.config, resolved.origins, None, through)
    retraining.save_attempt(attempt, train=record.id)
    return record


@task(name="name challenger", cache_policy=NO_CACHE)
def note_challenger(attempt: RetrainAttempt, record: TrainRecord, model: ModelRecord) -> RetrainAttempt:
    """Let the alias `challenger` point to the new model."""
    models.set_alias(model, "challenger")
    return retraining.save_attempt(attempt, train=record.id, challenger=model.name)


@task(name="compare", retries=1, retry_condition_fn=_was_killed, cache_policy=NO_CACHE)
def compare(attempt: RetrainAttempt) -> RetrainAttempt:
    """Compare champion and challenger on the held-out rows; returns the attempt with the decision."""
    with showing("comparing", "comparison-progress") as progress:
        attempt = retraining.compare(attempt, progress.follow)
    if attempt.comparison is not None:
        get_run_logger().info("%s", attempt.comparison.reason)
    return attempt


@task(name="note model", cache_policy=NO_CACHE)
def note_model(attempt: RetrainAttempt, model: ModelRecord) -> RetrainAttempt:
    """Note which model is to be champion, before the endpoint is switched to it."""
    return retraining.save_attempt(attempt, model=model.name)


@task(name="promote", cache_policy=NO_CACHE)
def promote(attempt: RetrainAttempt, model: ModelRecord) -> RetrainOutcome:
    """Make the model the champion and record why."""
    return _show(retraining.promote(attempt, model))


@task(name="refuse", cache_policy=NO_CACHE)
def refuse(attempt: RetrainAttempt) -> RetrainOutcome:
    """Leave the champion what it is and record why."""
    return _show(retraining.refuse(attempt))


@task(name="skip", cache_policy=NO_CACHE)
def skip(policy: RetrainPolicy, reason: str) -> RetrainOutcome:
    """Record why nothing was trained."""
    return _show(retraining.skip(policy, reason))


def _show(outcome: RetrainOutcome) -> RetrainOutcome:
    """Put the outcome among the flow run's artifacts, as a table with its reason; what Prefect refuses is logged."""
    from prefect.artifacts import create_table_artifact

    get_run_logger().info("%s %s: %s", outcome.line, outcome.result, outcome.reason)
    content = outcome.model_dump(mode="json", exclude={"comparison", "policy", "reason"}, exclude_none=True)
    if outcome.comparison is not None:
        content |= outcome.comparison.model_dump(exclude={"reason", "champion", "challenger"})
    table = [{"": name, "value": value if isinstance(value, str) else f"{value:g}"} for name, value in content.items()]
    try:
        create_table_artifact(
            table, key=f"retraining-{endpoint_name(outcome.line)}", description=f"{outcome.result}: {outcome.reason}"
        )
    except Exception as error:  # the Prefect server is away: the outcome is recorded all the same
        get_run_logger().warning("outcome not shown: %s", error)
    return outcome

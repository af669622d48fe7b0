"""The Prefect tasks of the flow `sweep`: a few lines each over `tasks.sweeping`."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from configs.records import QueueName, TrainRecord
from configs.sweeps import Sweep, SweepMember, SweepOutcome, told
from deployments.guard import guard_embedded_server
from tasks import comparing_report, lifecycle, sweeping, tracking, trains
from tasks.deploying import endpoint_name
from tasks.files import write_text
from tasks.progress import TerminalLine


@task(name="plan sweep", cache_policy=NO_CACHE)
def plan(
    source: str, over: list[str], changes: list[str], by: str | None, at_once: int | None, queue: QueueName
) -> Sweep:
    """The trains of the sweep, each configuration checked."""
    guard_embedded_server()
    return sweeping.plan_sweep(source, over, changes, by=by, at_once=at_once, queue=queue)


@task(name="run trains", cache_policy=NO_CACHE)
def run_trains(sweep: Sweep) -> None:
    """Run the trains that are not completed, some at a time; one that fails does not end the others."""
    lifecycle.settle()
    sweeping.save_sweep(sweep)
    done = [record for record in sweeping.trains_of(sweep).values() if trains.current_status(record) == "completed"]
    _tell(f"{len(sweep.members)} trains, {len(done)} of them completed already, {sweep.at_once} at a time")

    def on_change(member: SweepMember, record: TrainRecord | None) -> None:
        ended = f"{record.id} {record.status}" if record is not None else "could not begin"
        reason = record.reason if record is not None else sweeping.error_of(sweep, member)
        why = f": {reason.splitlines()[0]}" if reason else ""
        _tell(f"{member.number} of {len(sweep.members)}: {told(member.values)}: {ended}{why}")

    sweeping.run_trains(sweep, on_change)


@task(name="name the best", cache_policy=NO_CACHE)
def conclude(sweep: Sweep) -> SweepOutcome:
    """Compare the trains; the best one's model becomes the challenger of its line."""
    outcome = sweeping.conclude(sweep)
    get_run_logger().info("%s: %s", outcome.best, outcome.verdict)
    _show(outcome)
    _compare(outcome)
    return outcome


def _tell(text: str) -> None:
    get_run_logger().info("%s", text)
    if TerminalLine.on:  # its terminal does not show the log
        print(text, flush=True)


def _compare(outcome: SweepOutcome) -> None:
    """Keep the page of the trains side by side, show it on the flow run's page, and tell MLflow the verdicts."""
    from prefect.artifacts import create_markdown_artifact

    found = sweeping.compare(outcome)
    if found is None:
        return
    comparison, records = found
    page = sweeping.sweep_folder(outcome.sweep) / sweeping.COMPARISON_FILE
    write_text(page, comparing_report.as_page(comparison, records, outcome.page))
    tracking.log_verdicts(
        {record.run_id: comparison.verdicts[record.id] for record in records if record.id in comparison.verdicts}
    )
    try:
        create_markdown_artifact(
            comparing_report.as_markdown(comparison, records, outcome.page),
            key=f"sweep-{endpoint_name(outcome.line)}-comparison",
            description=f"the trains of sweep {outcome.sweep} side by side",
        )
    except Exception as error:  # the Prefect server is away: the page is kept all the same
        get_run_logger().warning("comparison not shown: %s", error)


def _show(outcome: SweepOutcome) -> None:
    """Put the ranking among the flow run's artifacts; what Prefect refuses is logged."""
    from prefect.artifacts import create_table_artifact

    rows = [
        {"train": each.train, **each.values, outcome.by: each.figure, "status": each.status, "reason": each.reason}
        for each in outcome.standings
    ]
    try:
        create_table_artifact(rows, key=f"sweep-{endpoint_name(outcome.line)}", description=outcome.verdict)
    except Exception as error:  # the Prefect server is away: the outcome is recorded all the same
        get_run_logger().warning("outcome not shown: %s", error)

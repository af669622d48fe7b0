"""`tuneline retrain`: schedule, list, show, unschedule, run, rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from configs.errors import UserError
from configs.retraining import AfterPromotion, MetricName
from configs.settings import load_settings
from flows.printing import print_fields, print_json, print_table

if TYPE_CHECKING:
    from configs.retraining import RetrainOutcome

app = typer.Typer(
    help="Train a line again, promote only what is better. On held-out rows, by a margin, with an interval.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Line = Annotated[str, typer.Argument(metavar="LINE", help="Line of models, which has the name of its trains.")]
Dataset = Annotated[str | None, typer.Option(help="Dataset to follow, or a file; by default the champion's.")]
HeldOut = Annotated[str | None, typer.Option(help="Held-out rows; by default those of the champion's train.")]
_METRICS = f"What must be better: {', '.join(get_args(MetricName))}; by default accuracy."
Metric = Annotated[MetricName | None, typer.Option(metavar="METRIC", help=_METRICS)]
Margin = Annotated[float | None, typer.Option(help="Points it must be better by; by default 1.", min=0, max=100)]
Confidence = Annotated[float | None, typer.Option(help="Level of the interval; by default 0.95.")]
Then = Annotated[AfterPromotion | None, typer.Option(help="What follows a promotion; by default registered.")]
Endpoint = Annotated[str | None, typer.Option(help="Endpoint to deploy to; by default named after the line.")]
Seed = Annotated[int | None, typer.Option(help="Start of the comparison's random choices.", min=0)]


@app.command()
def schedule(
    line: Line,
    cron: Annotated[str | None, typer.Option(help="When, such as '0 3 * * 1': Mondays at 3:00.")] = None,
    every: Annotated[str | None, typer.Option(help="Or how often, such as 7d, 12h, 30m.")] = None,
    timezone: Annotated[str, typer.Option(help="Zone of --cron, such as Europe/Berlin.")] = "UTC",
    on_new_data: Annotated[bool, typer.Option("--on-new-data", help="A new version of the dataset starts it.")] = False,
    pool: Annotated[str | None, typer.Option(help="Work pool of the hosts that have the line's models.")] = None,
    dataset: Dataset = None,
    evaluation_dataset: HeldOut = None,
    metric: Metric = None,
    margin: Margin = None,
    confidence: Confidence = None,
    then: Then = None,
    endpoint: Endpoint = None,
    seed: Seed = None,
) -> None:
    """Retrain a line on a schedule, or when it has new rows. What is not given stays as it was."""
    from flows.cli_trains import embedded

    embedded()
    from deployments.flow_deployments import change_schedule
    from deployments.retraining import RetrainedLine, checked_schedule, save_schedule
    from deployments.work_pools import WORK_POOL
    from tasks.retraining import resolve_policy, save_policy

    given = _given(dataset, evaluation_dataset, metric, margin, confidence, then, endpoint, seed)
    policy = resolve_policy(line, given)
    planned = checked_schedule(cron, every, timezone, on_new_data, policy, pool or WORK_POOL)
    save_policy(policy)
    save_schedule(load_settings(), line, planned)
    print_fields({**policy.model_dump(), "schedule": planned.told()})
    api = _deploy(planned.pool)
    if api is not None:
        deployed = RetrainedLine(policy=policy, schedule=planned)
        change_schedule(api, deployed)
        print(f"deployed as {deployed.title}; it can be started, paused and edited on the page")


@app.command()
def unschedule(line: Line) -> None:
    """Retrain a line no more by itself. Its policy and its history stay."""
    from flows.cli_trains import embedded

    embedded()
    from deployments.retraining import forget_schedule
    from tasks.retraining import line_folder

    line_folder(line)  # refuses what is no name
    forgotten = forget_schedule(load_settings(), line)
    if forgotten is None:
        raise UserError("this line has no schedule", field="line", value=line, mend="see `tuneline retrain list`")
    _deploy(forgotten.pool)
    print(f"{line} is retrained only by `tuneline retrain run {line}` from now on")


def _deploy(pool: str) -> str | None:
    """Make the Prefect server follow the files, if one stands, and return its address."""
    import os

    from deployments.flow_deployments import deploy_flows

    api = os.environ.get("PREFECT_API_URL")
    if api is None:
        print("no Prefect server is running; what is planned is deployed by the next `tuneline up`")
    else:
        deploy_flows(load_settings(), api, pool)
    return api


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every line that is retrained: when, and what came of it last."""
    from deployments.retraining import scheduled_lines
    from tasks.retraining import list_policies, read_history

    planned = {item.policy.line: item.schedule.told() for item in scheduled_lines(load_settings())}
    found = [
        {
            "line": policy.line,
            "schedule": planned.get(policy.line),
            "dataset": policy.dataset,
            "then": policy.then,
            "last": outcome.result if outcome else None,
            "at": outcome.at if outcome else None,
        }
        for policy in list_policies()
        for outcome in [next(reversed(read_history(policy.line)), None)]
    ]
    if json_:
        print_json(found)
        return
    columns = ("Line", "Schedule", "Dataset", "After a promotion", "Last", "At")
    empty = "no line is retrained yet; `tuneline retrain schedule LINE` plans it"
    print_table(columns, [tuple(item.values()) for item in found], empty)


@app.command()
def show(line: Line, json_: Json = False) -> None:
    """The policy of a line, and what every retraining has come to."""
    from deployments.retraining import scheduled_lines
    from tasks.retraining import load_attempt, load_policy, read_history

    policy, history, attempt = load_policy(line), read_history(line), load_attempt(line)
    if policy is None and not history and attempt is None:
        raise UserError("this line was never retrained", field="line", value=line, mend="`tuneline retrain list`")
    planned = next((item.schedule for item in scheduled_lines(load_settings()) if item.policy.line == line), None)
    if json_:
        print_json(
            {
                "policy": policy.model_dump(mode="json") if policy else None,
                "schedule": planned.model_dump(mode="json") if planned else None,
                "open": attempt.model_dump(mode="json") if attempt else None,
                "history": [item.model_dump(mode="json") for item in history],
            }
        )
        return
    print_fields({**(policy.model_dump() if policy else {}), "schedule": planned.told() if planned else None})
    print()
    print_table(("At", "Result", "Model", "Reason"), [_row(item) for item in history], "nothing was retrained yet")
    if attempt is not None:
        print(f"not finished: the attempt of {attempt.began:%Y-%m-%d %H:%M} UTC; the next run goes on with it")


def _row(outcome: RetrainOutcome) -> tuple[Any, ...]:
    return outcome.at, outcome.result, outcome.model or outcome.challenger, outcome.reason


@app.command()
def run(
    line: Line,
    force: Annotated[bool, typer.Option("--force", help="Train although nothing is new.")] = False,
    dataset: Dataset = None,
    evaluation_dataset: HeldOut = None,
    metric: Metric = None,
    margin: Margin = None,
    confidence: Confidence = None,
    then: Then = None,
    endpoint: Endpoint = None,
    seed: Seed = None,
    json_: Json = False,
) -> None:
    """Retrain a line now, by its policy. What is given here counts for this run."""
    from flows.cli_trains import embedded

    embedded()
    from prefect import tags

    from deployments.flow_deployments import TAG
    from deployments.guard import start_embedded_server
    from flows.retrain import retrain
    from tasks.progress import TerminalLine

    start_embedded_server()
    TerminalLine.on = True
    given = _given(dataset, evaluation_dataset, metric, margin, confidence, then, endpoint, seed)
    # Watched by the shipped automations like a run of the page, where a server stands.
    with tags(TAG):
        outcome = retrain(line=line, force=force, **given)
    _show(outcome, json_)


@app.command()
def rollback(line: Line, json_: Json = False) -> None:
    """Take back the newest promotion. The champion before it is it again, and its endpoint serves it."""
    from flows.cli_trains import embedded

    embedded()
    from tasks.retraining import roll_back

    _show(roll_back(line), json_)


def _show(outcome: RetrainOutcome, json_: bool) -> None:
    if json_:
        print_json(outcome.model_dump(mode="json"))
        return
    print_fields(outcome.model_dump(exclude={"comparison", "policy"}))


def _given(
    dataset: str | None,
    evaluation_dataset: str | None,
    metric: MetricName | None,
    margin: float | None,
    confidence: float | None,
    then: AfterPromotion | None,
    endpoint: str | None,
    seed: int | None,
) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "evaluation_dataset": evaluation_dataset,
        "metric": metric,
        "margin": margin,
        "confidence": confidence,
        "then": then,
        "endpoint": endpoint,
        "seed": seed,
    }

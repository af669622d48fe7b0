"""`tuneline sweep`: several trains of one file that differ in some parameters, and the best of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.records import QueueName
from flows import cli_trains
from flows.printing import print_json, print_table, print_warning

if TYPE_CHECKING:
    from configs.sweeps import Sweep, SweepOutcome


def sweep(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="YAML file of a train, or a train.")],
    over: Annotated[
        list[str], typer.Option("--over", metavar="NAME=VALUE,...", help="Values to try; several make a grid.")
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    set_: cli_trains.Sets = [],  # noqa: B006
    by: Annotated[str | None, typer.Option(help="Figure that says which is best, such as rouge_l; else F1.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trains at a time; else as the GPUs allow.")] = None,
    queue: Annotated[QueueName, typer.Option(help="Who gets a GPU first where several trains wait.")] = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and start nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print what came of it as JSON.")] = False,
) -> None:
    """Train one file with several values, and name the best. Run again, it takes up what is not completed."""
    from tasks.sweeping import doubts, plan_sweep

    absolute = os.path.abspath(source) if Path(source).suffix in (".yaml", ".yml") else source  # noqa: PTH100
    plan = plan_sweep(absolute, over, set_, by=by, at_once=at_once, queue=queue)
    if not json_:
        _show_plan(plan)
    _check_first(plan, quiet=json_)
    for text in doubts(plan):
        print_warning(text)
    if dry_run:
        print("this sweep would run; nothing was started")
        return
    cli_trains.embedded()
    from deployments.guard import start_embedded_server
    from flows.sweep import sweep as run
    from tasks.progress import TerminalLine

    start_embedded_server()
    TerminalLine.on = not json_
    outcome: SweepOutcome = run(source=absolute, over=over, changes=set_, by=by, at_once=at_once, queue=queue)
    if json_:
        print_json(outcome.model_dump(mode="json"))
    else:
        _show_outcome(outcome)


def _show_plan(plan: Sweep) -> None:
    names = list(dict.fromkeys(name for member in plan.members for name in member.values))
    rows = [(member.number, *(member.values.get(name) for name in names)) for member in plan.members]
    print_table(("Train", *names), rows, "no trains", title=f"Sweep {plan.id}")
    # What all of them share is told once, at the first; each one's origins are kept with it.
    told = dict.fromkeys(text for member in plan.members for text in member.warnings)
    for text in told:
        print_warning(text)


def _check_first(plan: Sweep, *, quiet: bool) -> None:
    """Check each train that reads something else than the ones before it."""
    from configs.resolve import ResolvedTrain
    from tasks.checking import check_train

    seen = set()
    for member in plan.members:
        reads = member.config.model_dump_json(exclude={"hyperparameters", "method_params"})
        if reads in seen:
            continue
        seen.add(reads)
        if quiet:
            check_train(member.config)
        else:
            cli_trains.check_first(ResolvedTrain(config=member.config, origins=member.origins))


def _show_outcome(outcome: SweepOutcome) -> None:
    names = list(dict.fromkeys(name for each in outcome.standings for name in each.values))
    rows = [
        (each.train, *(each.values.get(name) for name in names), each.figure, each.reason or each.status)
        for each in outcome.standings
    ]
    less = " (less is better)" if outcome.lower_is_better else ""
    print()
    print_table(("Train", *names, f"{outcome.by}{less}", ""), rows, "no trains", title="The best first")
    print(f"\n{outcome.verdict}")
    print(f"\n{outcome.model} is {outcome.line}@challenger now")
    if outcome.champion is not None:
        print(f"the champion is {outcome.champion}; `tuneline models champion {outcome.model}` makes this one it")
    _show_comparison(outcome)


def _show_comparison(outcome: SweepOutcome) -> None:
    """What `tuneline trains compare` prints of the trains that have a place, each against the best one."""
    from tasks import sweeping

    found = sweeping.compare(outcome)
    if found is not None:
        print()
        cli_trains.show_comparison(*found, sweeping.sweep_folder(outcome.sweep) / sweeping.COMPARISON_FILE)

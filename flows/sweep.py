"""Several trains of one file that differ in some parameters, compared at the end; the best is the challenger.

Run as: python -m flows.sweep TRAIN.yaml --over learning_rate=1e-5,1e-4,1e-3
"""

from __future__ import annotations

from prefect import flow

from configs.records import QueueName
from configs.sweeps import SweepOutcome
from tasks import sweep_lifecycle as steps
from tasks import sweeping


@flow(name="sweep")
def sweep(
    source: str,
    over: list[str] | None = None,
    changes: list[str] | None = None,
    by: str | None = None,
    at_once: int | None = None,
    queue: QueueName = "default",
) -> SweepOutcome:
    """Run the trains of a sweep, or those that an earlier run has left; returns the ranking and the best one."""
    planned = steps.plan(source, over or [], changes or [], by, at_once, queue)
    with sweeping.holding(planned.id):
        steps.run_trains(planned)
        return steps.conclude(planned)


def main() -> None:
    """Run the sweep of the command line with no server at all; exit code 0 only if it worked."""
    import argparse
    import sys

    from configs.errors import UserError
    from configs.settings import load_settings
    from deployments.guard import start_embedded_server
    from deployments.services import connect

    parser = argparse.ArgumentParser(description=sweep.fn.__doc__)
    parser.add_argument("source", help="YAML file of a train, or a train")
    parser.add_argument("--over", action="append", default=[], metavar="NAME=VALUE,VALUE,...", help="values to try")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter of all")
    given = parser.parse_args()
    connect(load_settings())
    start_embedded_server()
    try:
        print(sweep(source=given.source, over=given.over, changes=given.set).model_dump_json(indent=2))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

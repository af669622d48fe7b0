"""One train of a sweep, in the process that the sweep has started for it.

Run as: python -m flows.sweep_train SWEEP NUMBER   (it stops when its standard input ends)
"""

from __future__ import annotations

from prefect import flow

from configs.endpoints import Endpoint
from configs.records import ModelRecord, SweepPlace
from configs.train import effective_through
from flows.resume import PATHS
from tasks import lifecycle, sweeping


@flow(name="sweep-train", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def sweep_train(sweep: str, number: int) -> ModelRecord | Endpoint:
    """Run a train of a sweep, or take up the one that an earlier run has begun; returns what it made."""
    found = sweeping.load_sweep(sweep)
    member = next(each for each in found.members if each.number == number)
    begun = sweeping.trains_of(found).get(number)
    path = effective_through(member.config)
    if begun is not None:
        record = lifecycle.open_train(None, None, begun.id, path, queue=found.queue)
    else:
        place = SweepPlace(sweep=sweep, number=number)
        record = lifecycle.open_train(member.config, member.origins, None, path, queue=found.queue, sweep=place)
    with lifecycle.closing(record.id):
        return PATHS[path](record)


def main() -> None:
    """Run the train that the command line names; the sweep is told what went wrong, if anything did."""
    import os
    import sys
    import threading

    from configs.settings import load_settings
    from deployments.automations import train_tag
    from deployments.flow_deployments import TAG
    from deployments.guard import start_embedded_server
    from deployments.services import connect
    from deployments.work_pools import WORK_POOL

    def end_with_the_sweep() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock, held by a thread, would abort the interpreter's exit
            pass
        sweeping.stop_train(sweep, number)

    sweep, number = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=end_with_the_sweep, daemon=True).start()
    connect(load_settings())
    start_embedded_server()
    from prefect import tags

    with sweeping.telling_errors(sweep, number), tags(TAG, train_tag(WORK_POOL), f"sweep:{sweep}"):
        sweep_train(sweep=sweep, number=number)


if __name__ == "__main__":
    main()

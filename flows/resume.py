"""Takes a train up again from its newest checkpoint, through the path its record says.

Started from the page, or by the automation that hears of a crashed flow run; in the terminal it is
`tuneline trains resume`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import State, flow
from prefect.states import Completed

from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.train import effective_through
from flows.complete import train_to_complete
from flows.customized import train_from_base
from flows.deployed import train_to_deployed
from tasks import lifecycle

PATHS: dict[str, Callable[[TrainRecord], ModelRecord | Endpoint]] = {
    "customized": train_from_base,
    "complete": train_to_complete,
    "deployed": train_to_deployed,
}


@flow(name="resume", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def resume(train: str | None = None, crashed_flow_run: str | None = None) -> ModelRecord | Endpoint | State[Any]:
    """Go on with `train`, or, if its policy allows it, with the train of `crashed_flow_run`; returns what it made."""
    if (train is None) == (crashed_flow_run is None):
        raise UserError("give either a train or a flow run that crashed", field="train, crashed_flow_run")
    if crashed_flow_run is not None:
        decision = lifecycle.decide_after_crash(crashed_flow_run)
        if not decision.resume:
            return Completed(name="NotResumed", message=decision.reason)
        train = decision.train
    found = lifecycle.find_train(str(train))
    path = effective_through(found.config)
    record = lifecycle.open_train(None, None, found.id, path, queue=found.queue)
    with lifecycle.closing(record.id):
        return PATHS[path](record)

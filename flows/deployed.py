"""The lifecycle paths to a deployed model: from a train, or from a base, customized or complete model.

Run as: python -m flows.deployed TRAIN.yaml   or   python -m flows.deployed --model MODEL
"""

from __future__ import annotations

from prefect import flow

from configs.endpoints import Endpoint
from configs.records import QueueName, ServedAs, TrainRecord
from configs.train import TrainConfig
from flows.complete import train_to_complete
from tasks import lifecycle


def train_to_deployed(record: TrainRecord) -> Endpoint:
    """Train, save as a complete model, and serve it as the record says."""
    made = train_to_complete(record)
    lifecycle.release_gpus(record)
    how = record.served_as
    endpoint = how.endpoint or record.config.endpoint
    return lifecycle.deploy_model(made, endpoint, how.target, how.quantization, how.port)


@flow(name="deployed", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def deployed(
    train: TrainConfig | None = None,
    origins: dict[str, str] | None = None,
    resume: str | None = None,
    model: str | None = None,
    endpoint: str | None = None,
    target: str | None = None,
    quantization: str | None = None,
    port: int | None = None,
    queue: QueueName | None = None,
    profile: str | None = None,
) -> Endpoint:
    """Serve `model`, or the complete model of a train, at an endpoint; returns the endpoint.

    Without a `target` it is the first of the method's.
    """
    if model is not None:
        return lifecycle.deploy_model(lifecycle.find_model(model), endpoint, target, quantization, port)
    served_as = ServedAs(endpoint=endpoint, target=target, quantization=quantization, port=port)
    record = lifecycle.open_train(train, origins, resume, "deployed", endpoint, queue, served_as, profile)
    with lifecycle.closing(record.id):
        return train_to_deployed(record)


if __name__ == "__main__":
    from flows.command import run_flow_file

    run_flow_file(deployed)

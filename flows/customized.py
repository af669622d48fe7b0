"""The lifecycle path base → customized: an adapter on top of a base model.

Run as: python -m flows.customized TRAIN.yaml
"""

from __future__ import annotations

from prefect import flow

from configs.records import ModelRecord, QueueName, TrainRecord
from configs.train import TrainConfig, effective_through
from tasks import lifecycle


def train_from_base(record: TrainRecord) -> ModelRecord:
    """Train and register; full-parameter training gives weights that are still to be saved.

    Whether there is an adapter, the training says itself.
    """
    record = lifecycle.fetch_base(record)
    record = lifecycle.prepare_datasets(record)
    record = lifecycle.take_gpus(record)
    record = lifecycle.evaluate_base(record)
    record = lifecycle.train_model(record)
    trained = lifecycle.trained_model(record)
    if not trained.adapter and effective_through(record.config) != "customized":
        return trained
    model = lifecycle.register_customized(record)
    return lifecycle.evaluate_tuned(record, model)


@flow(name="customized", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def customized(
    train: TrainConfig | None = None,
    origins: dict[str, str] | None = None,
    resume: str | None = None,
    queue: QueueName | None = None,
    profile: str | None = None,
) -> ModelRecord:
    """Train an adapter from its configuration, or take up the train `resume`; returns the customized model."""
    record = lifecycle.open_train(train, origins, resume, "customized", queue=queue, profile=profile)
    with lifecycle.closing(record.id):
        return train_from_base(record)


if __name__ == "__main__":
    from flows.command import run_flow_file

    run_flow_file(customized)

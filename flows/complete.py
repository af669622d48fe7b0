"""The lifecycle paths to a complete model: base → customized → complete, base → complete, customized → complete.

Run as: python -m flows.complete TRAIN.yaml   or   python -m flows.complete --model CUSTOMIZED
"""

from __future__ import annotations

from prefect import flow

from configs.errors import UserError
from configs.records import ModelRecord, QueueName, TrainRecord
from configs.train import TrainConfig
from flows.customized import train_from_base
from tasks import lifecycle


def train_to_complete(record: TrainRecord) -> ModelRecord:
    """Train and save as a complete model; fully trained weights are scored once they are saved."""
    trained = train_from_base(record)
    model = lifecycle.save_complete(trained)
    return model if trained.stage == "customized" else lifecycle.evaluate_tuned(record, model)


@flow(name="complete", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def complete(
    train: TrainConfig | None = None,
    origins: dict[str, str] | None = None,
    resume: str | None = None,
    model: str | None = None,
    checkpoint: str | None = None,
    queue: QueueName | None = None,
    profile: str | None = None,
) -> ModelRecord:
    """Make a complete model from a train, or from the customized `model`; returns it.

    With `checkpoint` (a step, `best` or `last`) it is made of that checkpoint of the train that `model` names.
    """
    if model is not None and checkpoint is not None:
        return lifecycle.save_complete(lifecycle.save_checkpoint(model, checkpoint))
    if model is not None:
        found = lifecycle.find_model(model)
        if found.stage != "customized":
            raise UserError("only a customized model can be saved", field="model", value=f"{model} ({found.stage})")
        return lifecycle.save_complete(found)
    record = lifecycle.open_train(train, origins, resume, "complete", queue=queue, profile=profile)
    with lifecycle.closing(record.id):
        return train_to_complete(record)


if __name__ == "__main__":
    from flows.command import run_flow_file

    run_flow_file(complete)

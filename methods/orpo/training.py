"""Odds ratio preference optimization: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's ORPOTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from methods import contract
from methods.toolkit import (
    chat,
    chat_rows,
    hardware,
    memory,
    preference_rows,
    probing,
    saving_chat,
    training,
    tuning,
)


class Trainer(training.Repeatable, ORPOTrainer):
    """trl's trainer with a repeatable order of rows and a schedule with a floor."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature  # the library's own would tokenise a second time, and cut without counting


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make pairs of the training and validation rows and report what was kept and cut."""
    rows, validation = chat_rows.prepare_rows(job, tokenizer, preference_rows.pair_tokeniser())
    return _columns(rows), None if validation is None else _columns(validation)


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put what is trained on top of it; the seed decides an adapter's first weights."""
    set_seed(job.seed)
    model = tuning.load_trained_model(job)
    tuning.switch_dropout_off(model)
    if job.parameters["tuning"] == "full":
        return model
    return tuning.add_lora(model, tuning.lora_config(job.parameters))


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, pairs and arguments together and warn before the first step."""
    arguments = {
        **training.training_arguments(job, has_validation=validation is not None),
        "remove_unused_columns": False,  # the collator takes more columns than the model
        "max_length": job.parameters["max_seq_length"],  # rows are already within it, and what was cut is counted
        "disable_dropout": False,  # the base has none any more; lora_dropout is to count
        "beta": job.parameters["beta"],
    }
    events = training.EventWriter(job)
    samples = probing.SampleWriter(job, tokenizer, preference_rows.read_conversations)
    trainer = Trainer(
        model=model,
        args=ORPOConfig(**arguments),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[events, training.CheckpointKeeper(job), *([samples] if validation is not None else [])],
    )
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    # A row is two sequences in a batch.
    memory.report_memory(job, model, 2 * max(rows["length"]), job.parameters["tuning"])
    return trainer


def save(job: contract.Job, trainer: Trainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights), the tokenizer and the probe prompts."""
    conversations = preference_rows.read_conversations(Path(job.inputs["train_rows"]), -1)
    return saving_chat.save_trained(job, trainer, tokenizer, conversations, outcome)


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("reading the data")
    tokenizer = chat.training_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    model = prepare_model(job)
    trainer = build_trainer(job, model, tokenizer, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, tokenizer, outcome)


def _columns(pairs: Any) -> Any:
    """The pairs as the trainer takes them: whole conversations, labelled where answers are."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {"length": pair["length"]}
        for side in ("chosen", "rejected"):
            ids, prompt = pair["prompt_ids"] + pair[f"{side}_ids"], len(pair["prompt_ids"])
            marks = [0] * prompt + pair[f"{side}_trained"]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = [token if mark else chat.IGNORED for token, mark in zip(ids, marks, strict=True)]
        rows.append(row)
    return Dataset.from_list(rows)


if __name__ == "__main__":
    contract.run(main)

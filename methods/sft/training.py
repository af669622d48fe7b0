"""Supervised fine-tuning: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's SFTTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from methods import contract
from methods.toolkit import chat, chat_rows, hardware, memory, probing, saving_chat, tokenizing, training, tuning


class Trainer(training.Repeatable, SFTTrainer):
    """trl's trainer with a repeatable order of rows and a schedule with a floor."""


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Tokenise the training and validation rows and report what was kept and cut."""
    return chat_rows.prepare_rows(job, tokenizer)


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put what is trained on top of it; the seed decides an adapter's first weights."""
    set_seed(job.seed)
    model = tuning.load_trained_model(job)
    if job.parameters["tuning"] == "full":
        return model
    return tuning.add_lora(model, tuning.lora_config(job.parameters))


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, rows and arguments together and refuse or warn before the first step."""
    arguments = SFTConfig(
        **training.training_arguments(job, has_validation=validation is not None),
        max_length=None,  # rows are already limited, and what was cut is counted
    )
    events = training.EventWriter(job)
    samples = probing.SampleWriter(job, tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[events, training.CheckpointKeeper(job), *([samples] if validation is not None else [])],
    )
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    memory.report_memory(job, model, max(rows["length"]), job.parameters["tuning"])
    return trainer


def save(job: contract.Job, trainer: Trainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights), the tokenizer and the probe prompts."""
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
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


if __name__ == "__main__":
    contract.run(main)

"""A template of a training stage: transformers' Trainer, and a callback that keeps the stage contract.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from methods import contract
from methods.toolkit import chat, chat_rows, memory, saving_chat, tokenizing, training, tuning


class Report(TrainerCallback):
    """All that the contract asks of a trainer: curves, progress, checkpoints that are marked, stopping when asked."""

    def __init__(self, job: contract.Job) -> None:
        self.job = job

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        known = {training.CURVES[name]: value for name, value in logs.items() if name in training.CURVES}
        if "loss" in known or "eval_loss" in known:
            self.job.metrics(state.global_step, **known)
            print(f"step {state.global_step}/{state.max_steps}  {known}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.job.progress(state.global_step, state.max_steps)
        if self.job.cancelled:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        contract.mark_complete(self.job.checkpoints / f"checkpoint-{state.global_step}")
        contract.keep_newest(self.job.checkpoints, self.job.parameters["keep_checkpoints"])


class OwnTrainer(training.Repeatable, Trainer):
    """The order of rows and the schedule follow from the job alone, so that a resumed train is the same train."""


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


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> OwnTrainer:
    """Put model, rows and arguments together; this is the place for a loss or a trainer of your own."""
    arguments = TrainingArguments(
        **training.training_arguments(job, has_validation=validation is not None),
        label_smoothing_factor=job.parameters["label_smoothing"],
    )
    trainer = OwnTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        # Padded labels are left out of the loss; the pad token itself may be the one that ends an answer.
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=chat.IGNORED),
        callbacks=[Report(job)],
    )
    trainer.job = job
    trainer.lengths = list(rows["length"])
    memory.report_memory(job, model, max(rows["length"]), job.parameters["tuning"])
    return trainer


def save(job: contract.Job, trainer: OwnTrainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights), the tokenizer and the probe prompts."""
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    return saving_chat.save_trained(job, trainer, tokenizer, conversations, outcome)


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
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

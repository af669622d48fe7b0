"""Kahneman-Tversky optimization: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's KTOTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from methods import contract
from methods.toolkit import (
    chat,
    chat_rows,
    hardware,
    memory,
    pair_batches,
    preference_rows,
    probing,
    saving_chat,
    training,
    tuning,
)


class Trainer(training.Repeatable, KTOTrainer):
    """trl's trainer with a repeatable order of rows and a schedule with a floor."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # the library's own would tokenise a second time, and cut without counting


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make judged answers of the training and validation rows and report what was kept and cut."""
    rows, validation = chat_rows.prepare_rows(job, tokenizer, preference_rows.pair_tokeniser())
    return _judged(rows), None if validation is None else _judged(validation)


def prepare_model(job: contract.Job) -> tuple[Any, LoraConfig | None]:
    """Load the base model, and say which adapter the trainer is to put on it: without it, it is the reference."""
    model = tuning.load_trained_model(job)
    tuning.switch_dropout_off(model)
    return model, tuning.fitting_lora(model, job.parameters) if job.parameters["tuning"] == "lora" else None


def build_trainer(
    job: contract.Job, model: Any, lora: LoraConfig | None, tokenizer: Any, rows: Any, validation: Any | None
) -> Trainer:
    """Put model, reference, answers and arguments together and refuse or warn before the first step."""
    p = job.parameters
    if p["batch_size"] < 2:
        raise contract.Refused(
            "batch_size is 1, and each prompt is also shown another one's answer: set it to 2 or more"
        )
    events = training.EventWriter(job)
    samples = probing.SampleWriter(job, tokenizer, preference_rows.read_conversations)
    reference = None if lora else tuning.load_reference(job)
    arguments = {
        **training.training_arguments(job, has_validation=validation is not None),
        "remove_unused_columns": False,  # the collator takes more columns than the library's own
        "max_length": None,  # rows are already limited, and what was cut is counted
        "disable_dropout": False,  # the base has none any more; lora_dropout is to count
        "beta": p["beta"],
        "loss_type": p["loss_type"],
        "desirable_weight": p["desirable_weight"],
        "undesirable_weight": p["undesirable_weight"],
    }
    with tuning.refusing():
        trainer = Trainer(
            model=model,
            ref_model=reference,
            args=KTOConfig(**arguments),
            data_collator=pair_batches.JudgedCollator(pad_token_id=tokenizer.pad_token_id),
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[events, training.CheckpointKeeper(job), *([samples] if validation is not None else [])],
            peft_config=lora,
        )
    tuning.keep_adapter_precise(trainer.model)
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    frozen = 0 if reference is None else reference.num_parameters()
    memory.report_memory(job, trainer.model, max(rows["length"]), p["tuning"], frozen)
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
    model, lora = prepare_model(job)
    trainer = build_trainer(job, model, lora, tokenizer, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, tokenizer, outcome)


def _judged(pairs: Any) -> Any:
    """Each answer of the pairs by itself; the best one of a ranking, which is in several pairs, once."""
    rows = []
    seen: set[int] = set()
    for pair in pairs:
        for side in ("chosen", "rejected") if pair["row"] not in seen else ("rejected",):
            ids = pair[f"{side}_ids"]
            rows.append(
                {
                    "prompt_ids": pair["prompt_ids"],
                    "completion_ids": ids,
                    "completion_trained": pair[f"{side}_trained"],
                    "label": side == "chosen",
                    "length": len(pair["prompt_ids"]) + len(ids),
                }
            )
        seen.add(pair["row"])
    return Dataset.from_list(rows)


if __name__ == "__main__":
    contract.run(main)

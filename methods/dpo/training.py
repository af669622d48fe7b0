"""Direct preference optimization: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's DPOTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

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

SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.0, "aot_unpaired": 0.0}
"""The losses that know label smoothing, with what it is if nobody sets it (that of their papers)."""


class Trainer(training.Repeatable, DPOTrainer):
    """trl's trainer with a repeatable order of rows and a schedule with a floor."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # the library's own would tokenise a second time, and cut without counting


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make pairs of the training and validation rows and report what was kept and cut."""
    return chat_rows.prepare_rows(job, tokenizer, preference_rows.pair_tokeniser())


def prepare_model(job: contract.Job) -> tuple[Any, LoraConfig | None]:
    """Load the base model, and say which adapter the trainer is to put on it: without it, it is the reference."""
    model = tuning.load_trained_model(job)
    tuning.switch_dropout_off(model)
    return model, tuning.fitting_lora(model, job.parameters) if job.parameters["tuning"] == "lora" else None


def build_trainer(
    job: contract.Job, model: Any, lora: LoraConfig | None, tokenizer: Any, rows: Any, validation: Any | None
) -> Trainer:
    """Put model, reference, pairs and arguments together and refuse or warn before the first step."""
    p = job.parameters
    events = training.EventWriter(job)
    samples = probing.SampleWriter(job, tokenizer, preference_rows.read_conversations)
    reference = None if lora or p["reference_in_advance"] else tuning.load_reference(job)
    with tuning.refusing():
        trainer = Trainer(
            model=model,
            ref_model=reference,
            args=_arguments(job, has_validation=validation is not None),
            data_collator=pair_batches.PairCollator(pad_token_id=tokenizer.pad_token_id),
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
    # A row is two sequences in a batch.
    memory.report_memory(job, trainer.model, 2 * max(rows["length"]), p["tuning"], frozen)
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


def _arguments(job: contract.Job, *, has_validation: bool) -> DPOConfig:
    p = job.parameters
    _warn_of_settings(job)
    smoothing = p["label_smoothing"]
    if smoothing is None:
        smoothing = SMOOTHED.get(p["loss_type"], 0.0)
    arguments = {
        **training.training_arguments(job, has_validation=has_validation),
        "remove_unused_columns": False,  # the collator takes more columns than the library's own
        "max_length": None,  # rows are already limited, and what was cut is counted
        "disable_dropout": False,  # the base has none any more; lora_dropout is to count
        "beta": p["beta"],
        "loss_type": [p["loss_type"], *(["sft"] if p["sft_weight"] else [])],
        "loss_weights": [1.0, *([p["sft_weight"]] if p["sft_weight"] else [])],
        "label_smoothing": smoothing,
        "f_divergence_type": p["f_divergence"],
        "ld_alpha": p["length_desensitization"],
        "use_weighting": p["use_weighting"],
        "precompute_ref_log_probs": p["reference_in_advance"],
    }
    if p["discopop_tau"] is not None:
        arguments["discopop_tau"] = p["discopop_tau"]
    if p["f_alpha"] is not None:
        arguments["f_alpha_divergence_coef"] = p["f_alpha"]
    return DPOConfig(**arguments)


def _warn_of_settings(job: contract.Job) -> None:
    p = job.parameters
    useless = {
        "label_smoothing": p["loss_type"] not in SMOOTHED,
        "discopop_tau": p["loss_type"] != "discopop",
        "f_alpha": p["f_divergence"] != "alpha_divergence",
    }
    for name, unused in useless.items():
        if unused and p[name] is not None:
            job.warning(f"{name} has no effect with loss_type {p['loss_type']} and f_divergence {p['f_divergence']}")


if __name__ == "__main__":
    contract.run(main)

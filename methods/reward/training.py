"""A reward model: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's RewardTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from methods import contract
from methods.toolkit import (
    chat,
    chat_rows,
    hardware,
    memory,
    models,
    preference_rows,
    probing,
    saving_chat,
    scoring,
    training,
    tuning,
)


class Trainer(training.Repeatable, RewardTrainer):
    """trl's trainer with a repeatable order of rows, a schedule with a floor, and curves of both sides' scores."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **named: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **named)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for side, scores in zip(("chosen", "rejected"), outputs.logits.detach().squeeze(-1).chunk(2), strict=True):
            metrics[f"rewards/{side}"].append(self.accelerator.gather(scores).float().mean().item())
        return (loss, outputs) if return_outputs else loss


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make pairs of the training and validation rows and report what was kept and cut."""
    p = job.parameters
    plain = preference_rows.pair_tokeniser(p["ranking_pairs"])
    joined = preference_rows.pair_tokeniser(p["ranking_pairs"], p["multi_turn_share"], job.seed)
    rows, validation = chat_rows.prepare_rows(job, tokenizer, joined, plain)
    if p["score_margins"] and not any(rows["gap"]):
        raise contract.Refused("score_margins is for ranked rows, which have scores: these are chosen and rejected")
    return _columns(rows, p["score_margins"]), None if validation is None else _columns(validation, p["score_margins"])


def prepare_model(job: contract.Job) -> Any:
    """Load the base model under a new head; the seed decides the head's and the adapter's first weights."""
    set_seed(job.seed)
    model = tuning.load_trained_model(job, models.load_scorer)
    tuning.switch_dropout_off(model)
    if job.parameters["tuning"] == "full":
        return model
    return tuning.add_lora(model, tuning.lora_config(job.parameters, "SEQ_CLS"))


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, pairs and arguments together and warn before the first step."""
    p = job.parameters
    arguments = RewardConfig(
        **training.training_arguments(job, has_validation=validation is not None),
        max_length=None,  # rows are already limited, and what was cut is counted
        disable_dropout=False,  # the base has none any more; lora_dropout is to count
        center_rewards_coefficient=p["center_rewards_coefficient"] or None,
    )
    events = training.EventWriter(job)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[events, training.CheckpointKeeper(job)],
    )
    tuning.keep_adapter_precise(trainer.model)
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    # A row is two sequences in a batch.
    memory.report_memory(job, model, 2 * max(rows["length"]), p["tuning"])
    return trainer


def save(job: contract.Job, trainer: Trainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter with its head (or the full weights), the tokenizer, and conversations to compare scores on."""
    pairs = islice(preference_rows.read_pairs(Path(job.inputs["train_rows"]), -1), probing.PROBE_ROWS)
    conversations = [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    probing.write_scored(job.output, [(each, scoring.scored_tokens(tokenizer, each)) for each in conversations])
    return saving_chat.save_model(job, trainer, tokenizer, outcome)


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


def _columns(rows: Any, margins: bool) -> Any:
    """The pairs as the trainer takes them: whole conversations, with the margin that is asked for."""
    return Dataset.from_list(
        [
            {
                "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
                "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
                "length": row["length"],
                **({"margin": row["gap"]} if margins else {}),
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    contract.run(main)

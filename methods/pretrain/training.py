"""Continued pre-training on documents: full-parameter, LoRA, or LoRA on a 4-bit base, with trl's SFTTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from methods import contract
from methods.pretrain import batches, blocks, probes
from methods.toolkit import chat, memory, processes, saving_chat, training, tuning
from methods.toolkit.chat_template import TemplateSettings


class Trainer(training.Repeatable, SFTTrainer):
    """trl's trainer on ready blocks, with a repeatable order, a schedule with a floor, and the perplexity."""

    _total_train_tokens: float  # of trl's own

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        if batches.COUNTS in inputs:
            self.real_positions += int(inputs[batches.COUNTS].sum())
            self.all_positions += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *rest, **named)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        counts = inputs.pop(batches.COUNTS, None)
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *rest, **named)
        if counts is not None and self._total_train_tokens > before:
            # trl counts one row of a batch that has no attention mask.
            self._total_train_tokens = before + processes.summed([int(counts.sum())], self.args.device)[0]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs = {**logs, "eval_perplexity": float(torch.tensor(logs["eval_loss"]).exp())}
        super().log(logs, start_time)


def _load_tokenizer(job: contract.Job) -> Any:
    """The base model's tokenizer; documents do not say whether a model is served with thoughts, its template does."""
    settings = TemplateSettings.of_job(job.parameters, job.inputs)
    tokenizer, added = chat.load_tokenizer(job.inputs["base_model"], settings)
    for text in added:
        job.warning(text)
    return tokenizer


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make blocks of the training and validation documents, and write the probes; reports what the blocks hold."""
    rows, validation = blocks.prepare_blocks(job, tokenizer)
    if job.is_main:
        _write_probes(job, tokenizer)
    return rows, validation


def _write_probes(job: contract.Job, tokenizer: Any) -> None:
    """Before the train and not after it: a template that refuses them is told of while nothing is lost."""
    path = Path(job.inputs["train_rows"])
    try:
        probes.write_probes(job.output, tokenizer, path)
    except (ValueError, TemplateError) as error:
        job.warning(f"the model can be trained and saved, but not be served by chat: its template says {error}")
        probes.write_unrendered(job.output, tokenizer, path)


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put what is trained on top of it; the seed decides an adapter's first weights."""
    set_seed(job.seed)
    p = job.parameters
    model = tuning.load_trained_model(job)
    _require_positions(model, p["max_seq_length"])
    if p["packing"] and p["separate_documents"]:
        batches.require_separation(model)
    return model if p["tuning"] == "full" else tuning.add_lora(model, tuning.lora_config(p))


def _require_positions(model: Any, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise contract.Refused(
            f"max_seq_length is {length}, and the base model reads at most {most} tokens at once: lower max_seq_length"
        )


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, blocks and arguments together and refuse or warn before the first step."""
    p = job.parameters
    separate = p["packing"] and p["separate_documents"]
    if p["separate_documents"] and not separate:
        job.warning("separate_documents has no effect with packing: false, where a block holds one document")
    arguments = SFTConfig(
        **{
            **training.training_arguments(job, has_validation=validation is not None),
            "remove_unused_columns": False,  # the collator reads where documents start
            "max_length": None,  # blocks have their length
        }
    )
    events = training.EventWriter(job)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=batches.BlockCollator(tokenizer.pad_token_id, separate=separate),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[events, training.CheckpointKeeper(job)],
    )
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    memory.report_memory(job, model, max(rows["length"]), p["tuning"])
    return trainer


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    job.phase("reading the data")
    tokenizer = _load_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    model = prepare_model(job)
    trainer = build_trainer(job, model, tokenizer, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    result = saving_chat.save_model(job, trainer, tokenizer, outcome)
    blocks.remove_blocks(job)
    return result


if __name__ == "__main__":
    contract.run(main)

"""Supervised fine-tuning of a model that reads images: LoRA, LoRA on a 4-bit base, or full, with trl's SFTTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from methods import contract
from methods.toolkit import (
    chat_rows,
    hardware,
    memory,
    models,
    probing,
    remote_code,
    training,
    tuning,
    vision_answering,
    vision_models,
    vision_rows,
)
from methods.toolkit.vision_rows import Renderer


class Trainer(training.Repeatable, SFTTrainer):
    """trl's trainer with a repeatable order of rows and a schedule with a floor."""


def prepare_processor(job: contract.Job) -> Renderer:
    """Load the processor and say what had to be added to it, or to what its template makes."""
    p = job.parameters
    renderer, added = vision_rows.training_renderer(
        job.inputs["base_model"], p["image_min_pixels"], p["image_max_pixels"]
    )
    for text in added:
        job.warning(text)
    return renderer


def prepare_data(job: contract.Job, renderer: Renderer) -> tuple[Any, Any | None]:
    """Render the training and validation rows and report what was kept."""
    return chat_rows.prepare_rows(job, renderer, vision_rows.tokenise)


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put what is trained on top of it; the seed decides an adapter's first weights."""
    set_seed(job.seed)
    p = job.parameters
    model = tuning.load_trained_model(job, vision_models.load_model, vision_models.first_weights(job))
    if p["tuning"] == "full":
        if p["freeze_vision"]:
            vision_models.freeze_vision(model)
        return model
    targets = vision_models.language_targets(model, p["lora_targets"]) if p["freeze_vision"] else p["lora_targets"]
    return tuning.add_lora(model, tuning.lora_config({**p, "lora_targets": targets}))


def build_trainer(job: contract.Job, model: Any, renderer: Renderer, rows: Any, validation: Any | None) -> Trainer:
    """Put model, rows and arguments together and warn before the first step."""
    arguments = SFTConfig(
        **training.training_arguments(job, has_validation=validation is not None)
        | {"remove_unused_columns": False},  # the collator makes a batch of columns that the model does not know
        max_length=None,  # rows are already limited, and what was left out is counted
    )
    events = training.EventWriter(job)
    samples = [vision_answering.SampleWriter(job, renderer)] if validation is not None else []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=vision_rows.Collator(renderer),
        processing_class=renderer.processor,
        callbacks=[events, training.CheckpointKeeper(job), *samples],
    )
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    memory.report_memory(job, model, max(rows["length"]), job.parameters["tuning"])
    return trainer


def save(job: contract.Job, trainer: Trainer, renderer: Renderer, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights), the processor and the probe prompts."""
    models.save_trained(trainer.model, job.output)
    renderer.processor.save_pretrained(job.output)
    remote_code.carry(job.inputs["base_model"], job.output)
    rows = list(vision_rows.read_rows(Path(job.inputs["train_rows"]), probing.PROBE_ROWS))
    vision_answering.write_probes(job.output, renderer, rows)
    return {"model": str(job.output), "adapter": job.parameters["tuning"] != "full", **outcome}


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("reading the data")
    renderer = prepare_processor(job)
    rows, validation = prepare_data(job, renderer)
    job.phase("loading the model")
    model = prepare_model(job)
    trainer = build_trainer(job, model, renderer, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, renderer, outcome)


if __name__ == "__main__":
    contract.run(main)

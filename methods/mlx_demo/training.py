"""LoRA on Apple MLX, with mlx-lm's training loop.

Run as: python training.py JOB_DIR

What it leaves is an adapter in peft's form, so that the stages after it, and every server, take it as any other.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

if sys.platform != "darwin":
    # The CPU backend would compile each kernel with g++ when it is first used, a minute in all.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from methods import contract
from methods.mlx_demo import adapters, batches, optimizing
from methods.mlx_demo.progress import Reporter
from methods.toolkit import chat, chat_rows, probing, remote_code, tokenizing


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[list[Any], list[Any] | None]:
    """Tokenise the training and validation rows and report what was kept and cut."""
    turns = tokenizing.Turns.of_job(job.parameters)
    return chat_rows.prepare_rows(job, tokenizer, partial(tokenizing.tokenise_rows, turns=turns))


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put an adapter on its linear layers; the seed decides the adapter's first weights."""
    p = job.parameters
    mx.random.seed(job.seed)
    try:
        model, _ = load_model(Path(job.inputs["base_model"]))
    except (OSError, ValueError) as error:
        raise contract.Refused(f"mlx-lm cannot load {job.inputs['base_model']}: {error}") from error
    if p["dtype"] != "auto":
        model.set_dtype(getattr(mx, p["dtype"]))
    if p["load_in_4bit"]:
        nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    config = {
        "rank": p["lora_rank"],
        "scale": p["lora_alpha"] / p["lora_rank"],
        "dropout": p["lora_dropout"],
        "keys": adapters.chosen_layers(model, p["lora_targets"]),
    }
    linear_to_lora_layers(model, p["num_layers"], config)
    adapters.refuse_unknown_names(model, Path(job.inputs["base_model"]))
    mx.eval(model.parameters())
    return model


def build_trainer(job: contract.Job, model: Any, rows: list[Any], validation: list[Any] | None) -> Reporter:
    """Plan the steps, make the optimizer, and take up the checkpoint that the job names."""
    p = job.parameters
    order = batches.Plan(
        lengths=[row["length"] for row in rows],
        batch=p["batch_size"],
        accumulated=p["grad_accum_steps"],
        seed=job.seed,
        by_length=p["group_by_length"],
        epochs=p["epochs"],
        max_steps=p["max_steps"],
    )
    optimizer = optimizing.make_optimizer(p, order.steps)
    reporter = Reporter(job, model, optimizer, order, validation)
    if job.resume_from is not None:
        reporter.restore(job.resume_from)
    return reporter


def run(job: contract.Job, reporter: Reporter, rows: list[Any]) -> dict[str, float]:
    """Train from where the reporter stands to the end. Raises contract.Cancelled once a checkpoint is saved."""
    p = job.parameters
    accumulated = p["grad_accum_steps"]
    arguments = TrainingArgs(
        batch_size=p["batch_size"],
        iters=(reporter.plan.steps - reporter.step) * accumulated,
        steps_per_report=accumulated,  # one report an optimizer step
        steps_per_save=sys.maxsize,  # the reporter saves what a resumed train needs besides the weights
        max_seq_length=p["max_seq_length"],
        adapter_file=str(job.folder / "adapters.safetensors"),
        grad_checkpoint=p["gradient_checkpointing"],
        grad_accumulation_steps=accumulated,
    )
    if arguments.iters:
        stream = batches.training_stream(rows, reporter.plan, reporter.step)
        # mlx-lm draws a coloured table for a terminal, in a log mere noise: the reporter tells every step itself.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            train(
                reporter.model,
                reporter.optimizer,
                rows,
                args=arguments,
                loss=batches.loss,
                iterate_batches=lambda **_: stream,
                training_callback=reporter,
            )
    return reporter.outcome()


def save(job: contract.Job, reporter: Reporter, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter in peft's form, the tokenizer and the probe prompts."""
    adapters.save_for_peft(reporter.model, job.output, job.inputs["base_model"], job.parameters)
    chat.save_tokenizer(tokenizer, job.output)
    remote_code.carry(job.inputs["base_model"], job.output)
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    probing.write_probes(job.output, tokenizer, conversations)
    return {"model": str(job.output), "adapter": True, **outcome}


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    job.phase("reading the data")
    tokenizer = chat.training_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    model = prepare_model(job)
    reporter = build_trainer(job, model, rows, validation)
    job.phase("training")
    outcome = run(job, reporter, rows)
    job.phase("saving")
    return save(job, reporter, tokenizer, outcome)


if __name__ == "__main__":
    contract.run(main)

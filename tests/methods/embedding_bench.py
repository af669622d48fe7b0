"""Program: many jobs of the method embedding in one process of its environment, which takes long to start.

Run as: python -m tests.methods.embedding_bench JOBS_JSON RESULTS_JSON   (with the environment's interpreter)

JOBS_JSON holds a list of {"do", "folder"}: `do` is the name of a file of the method, whose `main` is run on the job
folder, or `describe`: the trainer is built, and what it has been given is told. RESULTS_JSON gets what each returned,
or {"refused": text}.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from methods import contract


def describe(job: contract.Job) -> dict[str, Any]:
    """What the parameters of a job have become, before its first step."""
    from methods.embedding import training

    model = training.prepare_model(job)
    rows, validation = training.prepare_data(job, model)
    trainer = training.build_trainer(job, model, rows, validation)
    steps = 20
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(steps, trainer.optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
        trainer.optimizer.step()
        scheduler.step()
    loss, inner = trainer.loss, getattr(trainer.loss, "loss", trainer.loss)
    adapters = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    first = next(iter(adapters.values()), None)
    return {
        "arguments": {
            name: value for name, value in vars(trainer.args).items() if isinstance(value, str | int | float)
        },
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "dtype": str(next(model.parameters()).dtype),
        "lora": None if first is None else [first.r["default"], first.lora_alpha["default"], _dropout(first)],
        "loss": [type(loss).__name__, type(inner).__name__],
        "scale": getattr(inner, "scale", None),
        "margin": getattr(inner, "triplet_margin", None),
        "mini_batch": getattr(loss, "mini_batch_size", None),
        "dimensions": list(getattr(loss, "matryoshka_dims", [])),
        "pooling": model[1].pooling_mode,
        "max_seq_length": model.max_seq_length,
        "prompts": model.prompts,
        "column_prompts": trainer.args.prompts,
        "rows": len(rows),
        "batches": list(trainer.batches),
        "lengths": rows["length"][:],
        "rates": rates,
        "weight_decay": max(group["weight_decay"] for group in trainer.optimizer.param_groups),
        "optimizer": [type(trainer.optimizer).__module__, type(trainer.optimizer).__name__],
    }


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout["default"], "p", 0.0))


def main(jobs: Path, results: Path) -> None:
    """Do every job."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = []
    for each in json.loads(jobs.read_text(encoding="utf-8")):
        job = contract.Job(Path(each["folder"]))
        do = describe if each["do"] == "describe" else import_module(f"methods.embedding.{each['do']}").main
        try:
            result = dict(do(job))
        except contract.Refused as refusal:
            result = {"refused": str(refusal)}
        contract.write_json(job.folder / contract.RESULT_FILE, result)
        found.append(result)
    results.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Builds the trainer of each job folder in the environment of ppo and writes down what the parameters have become.

Run as: python ppo_observer.py JOB_DIR...   (writes JOB_DIR/observed.json)
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from methods import contract
from methods.ppo import training as ppo
from methods.toolkit import training


class _Built(Exception):
    """Carries a trainer out of a stage that is about to train."""


def build(folder: Path) -> Any:
    """The trainer of a job, before its first step."""

    def stop(trainer: Any, job: contract.Job) -> None:
        raise _Built(trainer)

    with patch.object(training, "run_training", stop):
        try:
            ppo.main(contract.Job(folder))
        except _Built as built:
            return built.args[0]
    raise AssertionError("the stage has built no trainer")


def observe(trainer: Any) -> dict[str, Any]:
    """What can be seen of the parameters in a trainer."""
    args, model = trainer.args, trainer.model
    actor = [(name, p) for name, p in model.named_parameters() if name.startswith("policy.")]
    critic = [(name, p) for name, p in model.named_parameters() if name.startswith("value_model.")]
    adapter = getattr(model.policy, "peft_config", {}).get("default")
    groups = trainer.optimizer.param_groups
    evaluation = next((each for each in trainer.callback_handler.callbacks if hasattr(each, "every")), None)
    batches = list(islice(iter(trainer.prompts), 4))
    return {
        "trained": sorted({name.split(".")[-2] for name, p in actor if p.requires_grad}),
        "critic_trained": sorted({name.split(".")[-2] for name, p in critic if p.requires_grad}),
        "reference": trainer.ref_model is not None,
        "adapter": [adapter.r, adapter.lora_alpha, sorted(adapter.target_modules)] if adapter else None,
        "actor_rates": sorted({group["initial_lr"] for group in groups if group["part"] == "policy."}),
        "critic_rates": sorted({group["initial_lr"] for group in groups if group["part"] == "value_model."}),
        "decays": sorted({group["weight_decay"] for group in groups}),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "rates": rates(trainer),
        "clipped": clipped(trainer),
        "prompts": len(trainer.prompts.rows),
        "longest": max(len(ids) for ids in trainer.prompts.ids),
        "orders": [trainer.prompts.rows_of(step) for step in range(3)],
        "padding": sum(int((each["input_ids"] == trainer.prompts.pad).sum()) for each in batches),
        "update": len(batches[0]["input_ids"]),
        "forward": [args.per_device_train_batch_size, args.local_rollout_forward_batch_size],
        "accumulated": args.gradient_accumulation_steps,
        "steps": trainer.total_steps,
        "save_steps": args.save_steps,
        "evaluation": evaluation.every if evaluation is not None else None,
        "checkpointing": [model.policy.is_gradient_checkpointing, model.value_model.is_gradient_checkpointing],
        "seed": args.seed,
        "dtype": sorted({str(p.dtype) for _, p in actor}),
        "rewards": [[reward.name, reward.weight] for reward in trainer.head.rewards],
        "clip": trainer.head.clip,
        **{
            name: getattr(args, name)
            for name in ("response_length", "temperature", "num_ppo_epochs", "kl_coef", "kl_estimator", "cliprange")
        },
        **{name: getattr(args, name) for name in ("cliprange_value", "vf_coef", "gamma", "lam", "missing_eos_penalty")},
    }


def rates(trainer: Any) -> list[float]:
    """The factor of the actor's rate in each of the first 20 updates."""
    (peak,) = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["part"] == "policy."}
    found = []
    for _ in range(20):
        found.append(trainer.lr_scheduler.get_last_lr()[0] / peak)
        trainer.lr_scheduler.step()
    return found


def clipped(trainer: Any) -> list[float]:
    """The norms of the gradients of actor and critic in a step where they were large."""
    norms = []
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.new_ones(parameter.shape)
    trainer.optimizer.optimizer.step()
    for part in ("policy.", "value_model."):
        groups = [group["params"] for group in trainer.optimizer.param_groups if group["part"] == part]
        norms.append(float(sum((p.grad**2).sum() for group in groups for p in group) ** 0.5))
    return norms


def main() -> None:
    """Observe each of the job folders; a refusal is what there is to observe then."""
    for folder in map(Path, sys.argv[1:]):
        try:
            observed = observe(build(folder))
        except contract.Refused as refusal:
            observed = {"refused": str(refusal)}
        contract.write_json(folder / "observed.json", observed)


if __name__ == "__main__":
    main()

"""Keeps the best checkpoint of a training by a metric of its evaluations, and ends one that no longer improves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import processes
from methods.toolkit.best_metric import Evaluations, Standing, metrics_of, standing

_DEFAULT_METRICS = ("eval_loss", "eval_reward")
"""What a training is stopped by where keep_best is not set: the first of these that it evaluates."""


class BestStep:
    """What `keep_best` and early stopping make of the evaluations so far.

    It has no state of its own: the evaluations are in the trainer's history, which is in every checkpoint, so that a
    resumed training decides as one that was never interrupted.
    """

    def __init__(self, job: contract.Job) -> None:
        p = job.parameters
        self.wanted: str | None = p.get("keep_best")
        self.patience: int | None = p.get("early_stopping_patience")
        self.threshold: float = p.get("early_stopping_threshold", 0.0)

    @property
    def is_asked_for(self) -> bool:
        """Whether anything depends on the evaluations."""
        return self.wanted is not None or self.patience is not None

    def check(self, evaluations: Evaluations) -> None:
        """Raise Refused if the evaluations do not give the metric."""
        found, metric = metrics_of(evaluations), self._metric(evaluations)
        if evaluations and metric not in found:
            problem = "early_stopping_patience needs keep_best here"
            if metric is not None:
                problem = f"keep_best is {metric}, and this training does not evaluate it"
            raise contract.Refused(f"{problem}: set keep_best to one of {', '.join(found)}")

    def standing(self, evaluations: Evaluations) -> Standing | None:
        """The best and the last evaluation; None before the first finite one."""
        metric = self._metric(evaluations)
        return None if metric is None else standing(evaluations, metric, self.threshold)

    def kept_step(self, evaluations: Evaluations) -> int | None:
        """The step whose checkpoint is kept and becomes the product; None where that is not asked for."""
        found = self.standing(evaluations) if self.wanted is not None else None
        return None if found is None else found.best_step

    def has_ended(self, evaluations: Evaluations) -> bool:
        """Whether enough evaluations in a row were in vain."""
        found = self.standing(evaluations)
        return self.patience is not None and found is not None and found.in_vain >= self.patience

    def _metric(self, evaluations: Evaluations) -> str | None:
        found = metrics_of(evaluations)
        return self.wanted or next((name for name in _DEFAULT_METRICS if name in found), None)

    def outcome(self, evaluations: Evaluations, steps: int) -> dict[str, Any]:
        """What the result of the training says of it: the best step, its figure, the last one, why it has stopped."""
        found = self.standing(evaluations)
        if found is None:
            return {}
        outcome: dict[str, Any] = {}
        if self.wanted is not None:
            named = found.metric
            outcome |= {"best_step": found.best_step, f"best_{named}": found.best, f"last_{named}": found.last}
        if self.has_ended(evaluations):
            outcome["stopped"] = (
                f"stopped early at step {steps}: {found.metric} has not improved in {found.in_vain} evaluations; its "
                f"best is {found.best:.6g}, of step {found.best_step}"
            )
        return outcome


def load_best(trainer: Any, job: contract.Job, best: BestStep, evaluations: Evaluations) -> None:
    """Give the model of a finished training the weights of its best checkpoint."""
    if best.wanted is None:
        return
    found = best.standing(evaluations)
    if found is None:
        job.warning(f"no evaluation gave a finite {best.wanted}: the weights of the last step are kept")
        return
    # The processes have the same figures; that they load the same checkpoint must not hang on it.
    step = processes.summed([found.best_step if job.is_main else 0], trainer.args.device)[0]
    if step != trainer.state.global_step:
        load_weights(trainer, job.checkpoints / f"checkpoint-{step}")
    print(
        f"the best step by {found.metric} is {step} ({found.best:.6g}), and its weights are saved; the last evaluation "
        f"gave {found.last:.6g} at step {found.last_step}",
        flush=True,
    )


def load_weights(trainer: Any, checkpoint: Path) -> None:
    """Give the model of a trainer that has trained the weights of a checkpoint."""
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        deepspeed_load_checkpoint(trainer.model_wrapped, str(checkpoint), load_module_strict=False)
    elif trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint(str(checkpoint), trainer.model_wrapped)
    else:
        trainer._load_from_checkpoint(str(checkpoint))

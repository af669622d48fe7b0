"""Reports each optimizer step, evaluates, and keeps checkpoints that a train goes on from exactly."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import evaluate

from methods import contract
from methods.mlx_demo import batches, optimizing

_WEIGHTS, _OPTIMIZER, _STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"


class Reporter(TrainingCallback):
    """Stands at an optimizer step; mlx-lm calls it after each one."""

    def __init__(
        self, job: contract.Job, model: Any, optimizer: Any, plan: batches.Plan, validation: list[Any] | None
    ) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        self.plan, self.validation = plan, validation
        self.step = 0
        self._first = 0
        self._loss = 0.0  # summed over all steps
        self._tokens = self._earlier_tokens = 0
        self._seconds = 0.0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Report the step; save, evaluate or stop where it is time to. Raises contract.Cancelled, Refused."""
        self.step = self._first + train_info["iteration"] // self.plan.accumulated
        loss = float(train_info["train_loss"])
        if not math.isfinite(loss):
            raise contract.Refused(
                f"the loss became {loss}: the weights are of no use. Lower learning_rate or max_grad_norm."
            )
        self._loss += loss
        self._tokens = self._earlier_tokens + round(
            train_info["trained_tokens"]
        )  # mlx-lm counts from 0 in each attempt
        self._seconds += self.plan.accumulated / train_info["iterations_per_second"]
        self._report(loss, train_info)
        p = self.job.parameters
        last = self.step == self.plan.steps
        if self.validation is not None and (last or self.step % (p["evaluation_steps"] or self.plan.epoch_steps) == 0):
            self._evaluate()
        if self.job.cancelled and not last:
            self.save()
            raise contract.Cancelled
        if self.step % p["checkpoint_steps"] == 0:
            self.save()

    def save(self) -> None:
        """Write all that the rest of the train depends on, and remove what is too old."""
        folder = self.job.checkpoints / f"checkpoint-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / _WEIGHTS), dict(tree_flatten(self.model.trainable_parameters())))
        mx.save_safetensors(str(folder / _OPTIMIZER), dict(tree_flatten(self.optimizer.state)))
        high, low = mx.random.state[0].tolist()
        state = {"step": self.step, "loss": self._loss, "tokens": self._tokens, "seconds": self._seconds}
        state |= {"random": high << 32 | low}
        contract.write_json(folder / _STATE, state)
        contract.mark_complete(folder)
        contract.keep_newest(self.job.checkpoints, self.job.parameters["keep_checkpoints"])

    def restore(self, folder: Path) -> None:
        """Stand where the checkpoint was saved."""
        self.model.update(tree_unflatten(list(mx.load(str(folder / _WEIGHTS)).items())))
        self.optimizer.state = tree_unflatten(list(mx.load(str(folder / _OPTIMIZER)).items()))
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        mx.random.seed(state["random"])  # MLX's generator is its 64-bit key, and a seed is just that
        self.step = self._first = state["step"]
        self._loss, self._earlier_tokens, self._seconds = state["loss"], state["tokens"], state["seconds"]

    def outcome(self) -> dict[str, float]:
        """Steps, seconds of training and mean loss of all steps, those before a resume included."""
        return {"steps": self.step, "seconds": self._seconds, "loss": self._loss / self.step}

    def _report(self, loss: float, train_info: dict[str, Any]) -> None:
        values = {
            "loss": loss,
            "learning_rate": float(train_info["learning_rate"]),
            "grad_norm": float(self.optimizer.state[optimizing.NORM].item()),
            "epoch": self.step * self.plan.group / len(self.plan.lengths),
            "tokens": self._tokens,
            "tokens_per_second": float(train_info["tokens_per_second"]),
            "memory_gib": mx.get_peak_memory() / 2**30,
        }
        self.job.progress(self.step, self.plan.steps)
        if self.step == 1 or self.step % self.job.parameters["logging_steps"] == 0:
            self.job.metrics(self.step, **values)
            shown = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
            self._tell(shown)

    def _evaluate(self) -> None:
        batch = self.job.parameters["batch_size"]
        value = evaluate(
            model=self.model,
            dataset=self.validation,
            batch_size=batch,
            num_batches=-1,
            loss=batches.loss,
            iterate_batches=lambda **_: batches.validation_batches(self.validation or [], batch),
        )
        self.model.train()
        self.job.metrics(self.step, eval_loss=value)
        self._tell(f"eval_loss {value:.6g}")

    def _tell(self, text: str) -> None:
        # The true standard output: mlx-lm's own lines go nowhere while it trains.
        print(f"step {self.step}/{self.plan.steps}  {text}", file=sys.__stdout__, flush=True)

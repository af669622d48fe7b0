"""Leaves out updates whose loss or gradient is not finite, and ends the train when there are too many."""

from __future__ import annotations

import math
from typing import Any

import torch

from methods import contract
from methods.toolkit import processes

LEFT_OUT = "updates_left_out"
"""In a trainer's history: how many updates were left out so far. It is in every checkpoint, so a resume counts on."""


class FiniteUpdates:
    """Mixed in before a transformers trainer: an update that is not finite never reaches the weights.

    With the loss scaler of float16 an infinite gradient is usual: the scaler leaves that update out itself.
    """

    job: contract.Job
    args: Any
    state: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int
    _step_losses: tuple[torch.Tensor, ...] = ()

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        if self._globalstep_last_logged == self.state.global_step:
            # The library starts its sum over by subtracting it from itself, which does not clear a NaN.
            self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)
        loss = super().training_step(model, inputs, *rest, **named)  # type: ignore[misc]
        self._step_losses = (*self._step_losses, loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once an update: the gradient is whole, and the optimizer has not used it yet.
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        losses, self._step_losses = self._step_losses, ()
        loss = float(sum(losses))
        gradient = 0.0 if norm is None or self.accelerator.scaler is not None else float(norm)
        finite = math.isfinite(loss) and math.isfinite(gradient)
        if processes.any_of(not finite, self.args.device):
            self._leave_out(model, loss, gradient)
        return norm

    def _leave_out(self, model: Any, loss: float, gradient: float) -> None:
        left_out = _left_out(self.state.log_history) + 1
        most = self.job.parameters.get("stop_after_nonfinite", 1)
        # DeepSpeed has updated the weights by now.
        if left_out >= most or self.is_deepspeed_enabled:
            raise refusal(self.job, self.state.global_step, loss, gradient)
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, LEFT_OUT: left_out})
        self.job.warning(
            f"step {step}: {_what(loss, gradient)}; its update is left out (number {left_out}; {most} end the train)"
        )
        model.zero_grad(set_to_none=True)  # an optimizer passes over weights without a gradient


def refusal(job: contract.Job, steps: int, loss: float, gradient: float = 0.0) -> contract.Refused:
    """Why a train ends after `steps` updates, whose next one is not finite, and what is kept of it."""
    kept = [path.name.removeprefix("checkpoint-") for path in contract.complete_checkpoints(job.checkpoints)]
    text = f"{_what(loss, gradient)} at step {steps + 1}, and the train stops there. "
    if kept:
        text += f"The checkpoints of steps {', '.join(kept)} are kept. "
    if kept and int(kept[-1]) == steps:
        text += f"The weights of step {steps} are those that gave it. "
    text += "Lower learning_rate, lower max_grad_norm, or set dtype to float32 or bfloat16. A row can be the cause too."
    return contract.Refused(text)


def _what(loss: float, gradient: float) -> str:
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    return "the loss of another process is not finite" if math.isfinite(gradient) else f"the gradient became {gradient}"


def was_left_out(state: Any) -> bool:
    """Whether the update of the trainer's newest step was left out."""
    return any(LEFT_OUT in entry and entry["step"] == state.global_step for entry in state.log_history[-4:])


def _left_out(history: list[dict[str, float]]) -> int:
    return int(next((entry[LEFT_OUT] for entry in reversed(history) if LEFT_OUT in entry), 0))

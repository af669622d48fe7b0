"""The optimizer of MLX with the schedule, the clipping and the decay that the parameters ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

NORM = "grad_norm"
"""Where the optimizer's state keeps the norm of the newest gradients, before they are clipped."""


def make_optimizer(p: dict[str, Any], steps: int) -> Any:
    """The optimizer of the hyper-parameters `p` for a train of `steps` optimizer steps."""
    rate = schedule(p, steps)
    if p["optimizer"] == "adafactor":
        optimizer: Any = optim.Adafactor(
            rate, scale_parameter=False, relative_step=False, weight_decay=p["weight_decay"]
        )
    elif p["optimizer"] == "sgd":
        optimizer = optim.SGD(rate, weight_decay=p["weight_decay"])
    else:
        # As torch has it: without the correction the first steps would be many times smaller.
        optimizer = optim.AdamW(rate, weight_decay=p["weight_decay"], bias_correction=True)
    return _clipping(optimizer, p["max_grad_norm"])


def schedule(p: dict[str, Any], steps: int) -> Callable[[Any], Any]:
    """Learning rate by step (from 0), as transformers has these schedules, raised above learning_rate × decay ratio."""
    warmup = p["warmup_steps"] if p["warmup_steps"] is not None else math.ceil(p["warmup_ratio"] * steps)
    name, floor = p["lr_scheduler"], p["lr_decay_ratio"]
    if name == "constant":
        warmup = 0

    def rate(step: Any) -> Any:
        gone = mx.clip((step - warmup) / max(1, steps - warmup), 0, 1)
        shapes = {
            "linear": 1 - gone,
            "cosine": 0.5 * (1 + mx.cos(math.pi * gone)),
            "polynomial": (1 - gone) ** 2,
        }
        factor = shapes.get(name, mx.array(1.0))
        if warmup:
            factor = mx.where(step < warmup, step / warmup, factor)
        return p["learning_rate"] * (floor + (1 - floor) * factor)

    return rate


def _clipping(optimizer: Any, most: float) -> Any:
    apply = optimizer.update

    def update(model: Any, gradients: dict[str, Any]) -> None:
        clipped, norm = optim.clip_grad_norm(gradients, most or math.inf)
        # In the state, because that is all of an optimizer that comes out of a compiled step.
        optimizer.state[NORM] = norm
        apply(model, clipped)

    optimizer.state[NORM] = mx.array(0.0)
    optimizer.update = update
    return optimizer

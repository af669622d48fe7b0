"""What AdaLoRA needs besides the trainer: ranks reduced in steps, orthogonal vectors, a state to resume from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from methods.contract import Refused

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANKS_FILE = "ranks.json"
_IMPORTANCE_FILE = "importance.safetensors"


class RankSchedule(TrainerCallback):
    """Reduces the ranks after each step, on a schedule that spans the steps of the trainer."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        config = model.active_peft_config
        steps = state.max_steps
        config.total_step, config.tinit, config.tfinal = steps, int(self.start * steps), int(self.end * steps)
        if steps - config.tfinal < 2:
            raise Refused(
                f"adalora cannot reduce ranks in {steps} steps, {config.tfinal} of them with the final ranks: train "
                "longer, or lower adalora_end"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if all(parameter.grad is None for parameter in model.parameters()):
            return  # this update was left out
        # Here the gradients are still there, which the importance of a weight is measured by.
        model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality(model: Any) -> torch.Tensor:
    """Mean distance (Frobenius norm) of the vectors of each adapted module from orthogonal ones.

    The library adds it to a loss it is given, but the trainer makes its loss itself.
    """
    distances = []
    for name, weight in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = weight @ weight.T if "lora_A" in name else weight.T @ weight
            distances.append(torch.norm(product - torch.eye(len(product), device=product.device), p="fro"))
    return torch.stack(distances).mean()


def save_ranks(model: Any, folder: Path) -> None:
    """Write how important each weight was so far, and which ranks are left."""
    allocator = model.base_model.rankallocator
    importance = {
        f"{kind} {name}": tensor.contiguous().cpu()
        for kind in _IMPORTANCE
        for name, tensor in getattr(allocator, kind).items()
    }
    save_file(importance, folder / _IMPORTANCE_FILE)
    (folder / _RANKS_FILE).write_text(json.dumps(model.active_peft_config.rank_pattern), encoding="utf-8")


def load_ranks(model: Any, folder: Path) -> None:
    """Take up what `save_ranks` has written."""
    allocator = model.base_model.rankallocator
    for key, tensor in load_file(folder / _IMPORTANCE_FILE, device=str(model.device)).items():
        kind, _, name = key.partition(" ")
        getattr(allocator, kind)[name] = tensor
    model.active_peft_config.rank_pattern = json.loads((folder / _RANKS_FILE).read_text(encoding="utf-8"))

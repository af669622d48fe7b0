"""Adapters of MLX: which layers get one, and their weights in peft's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear
from safetensors import safe_open

from methods import contract


def chosen_layers(model: Any, targets: str | list[str]) -> set[str]:
    """Names within a block of the linear layers that `lora_targets` means. Raises Refused if it means none."""
    found: set[str] = set()

    def note(name: str, module: Any) -> None:
        linear = isinstance(module, (nn.Linear, nn.QuantizedLinear))
        if linear and (targets == "all-linear" or name.rsplit(".", 1)[-1] in targets or name in targets):
            found.add(name)

    for layer in model.layers:
        layer.apply_to_modules(note)
    if not found:
        raise contract.Refused(f"lora_targets {targets!r} do not fit this model: none of its layers has such a name")
    return found


def adapted(model: Any) -> dict[str, Any]:
    """The layers that have an adapter, by their name in the whole model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def refuse_unknown_names(model: Any, base: Path) -> None:
    """Raise Refused if the weights of an adapted layer have another name in the base model's files.

    mlx-lm renames or joins the weights of some architectures; an adapter of theirs would fit nowhere else.
    """
    known: set[str] = set()
    for file in sorted(base.glob("model*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            known.update(weights.keys())
    unknown = [name for name in adapted(model) if f"{name}.weight" not in known]
    if unknown:
        raise contract.Refused(
            f"mlx-lm has its own names for weights of this architecture (such as {unknown[0]}): its adapter could be "
            "neither merged nor served. Train it with the method sft."
        )


def save_for_peft(model: Any, folder: Path, base: str, p: dict[str, Any]) -> None:
    """Write the adapters as peft reads them (adapter_model.safetensors and adapter_config.json)."""
    weights = {}
    for name, layer in adapted(model).items():
        # MLX multiplies from the left: (in, rank) and (rank, out), where peft has (rank, in) and (out, rank).
        weights[f"base_model.model.{name}.lora_A.weight"] = mx.contiguous(layer.lora_a.T)
        weights[f"base_model.model.{name}.lora_B.weight"] = mx.contiguous(layer.lora_b.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": p["lora_rank"],
        "lora_alpha": p["lora_alpha"],
        "lora_dropout": p["lora_dropout"],
        "target_modules": list(adapted(model)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    contract.write_json(folder / "adapter_config.json", config)

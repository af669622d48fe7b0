"""Estimates what a train needs before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_NF4_BYTES = 0.55  # 4 bits and the double-quantised scales
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.5, "sgd": 0.0}


def estimate_gib(config: Any, total: int, trainable: int, longest: int, parameters: dict[str, Any]) -> float:
    """Peak memory of training in GiB: weights, gradients, optimizer state, activations, logits.

    Activations of a transformer layer without checkpointing are about 16 hidden-size vectors a token besides the
    feed-forward's three (Korthikanti et al., 2022, section 4.1, without the attention matrix, which the fused
    kernels do not keep); with checkpointing one vector a layer is kept. The output head works on trained positions
    only, but never fewer than one chunk.
    """
    dtype = parameters["dtype"] if parameters["dtype"] in _BYTES else "float32"
    weights = total * (_NF4_BYTES if parameters["load_in_4bit"] else _BYTES[dtype])
    state = trainable * (4.0 + _OPTIMIZER_BYTES[parameters["optimizer"]])
    tokens = longest * parameters["batch_size"]
    text = config.get_text_config()
    per_layer = 16 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    if parameters["gradient_checkpointing"]:
        activations = tokens * (text.hidden_size * text.num_hidden_layers + per_layer)
    else:
        activations = tokens * per_layer * text.num_hidden_layers
    logits = 2 * min(tokens, 4096) * text.vocab_size * 4.0
    return float(weights + state + activations * _BYTES[dtype] + logits) / 2**30


def available_gib() -> float | None:
    """Free memory in GiB of the GPU, or of the machine; None where it cannot be told."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 2**30
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = table.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)

"""Estimates what a train needs, before its first step."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import expert_weights, hardware, models

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.5, "sgd": 0.0}
_LIBRARIES_GIB = 0.5
_HEAD_TOKENS = 4096  # the fused output head works on the trained positions in pieces


def estimate_gib(
    config: Any, weights: float, trainable: int, longest: int, parameters: dict[str, Any], *, has_head: bool = True
) -> float:
    """Peak memory of training in GiB: weights, gradients, optimizer state, activations, logits.

    `weights` is the size of the loaded weights in bytes, `trainable` a number of parameters, `longest` is the longest
    row in tokens, `has_head` is false for a model that gives no logits. On SmolLM2-135M (512 tokens, batch 1 to 8,
    LoRA in bfloat16 and float32, full in float32) it was within 13 % of the measured peak; with gradient checkpointing
    it was half of the peak, so take it for a lower bound there.
    """
    size = _BYTES[hardware.resolve_dtype(parameters["dtype"], hardware.training_device())]
    state = trainable * (4.0 + _OPTIMIZER_BYTES[parameters["optimizer"]])
    text = config.get_text_config()
    tokens = longest * parameters["batch_size"]
    layer = _layer_bytes(text, size, lora=parameters["tuning"] == "lora")
    if parameters["gradient_checkpointing"]:
        activations = tokens * (text.hidden_size * size * text.num_hidden_layers + layer)
    else:
        activations = tokens * layer * text.num_hidden_layers
    logits = 2 * min(tokens, _HEAD_TOKENS) * text.vocab_size * 4.0 if has_head else 0.0
    return float((weights + state + activations + logits) / 2**30) + _LIBRARIES_GIB


def loaded_bytes(model: Any) -> float:
    """The memory that the weights and buffers of a model take as they are loaded, in bytes; shared ones count once."""
    tensors = {id(each): each for each in chain(model.parameters(), model.buffers())}
    return float(sum(each.nbytes + _scales_bytes(each) for each in tensors.values()))


def _scales_bytes(weight: Any) -> float:
    """What a 4-bit weight keeps beside its bytes: a scale for each of its blocks, quantised once more."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0.0
    outer = state.state2.absmax.nbytes if state.nested else 0
    return float(state.absmax.nbytes + outer)


def _width(model: Any) -> int:
    """Bytes of one weight of the base, where it is not quantised: the embeddings come first, and never are."""
    return next(int(each.element_size()) for each in model.parameters() if each.is_floating_point())


def _layer_bytes(text: Any, size: float, *, lora: bool) -> float:
    """Activations that one layer keeps for the backward pass, in bytes a token.

    About 16 hidden-size vectors besides the feed-forward's three (Korthikanti et al., 2022, section 4.1, without the
    attention matrix, which the fused kernels do not keep). LoRA on every linear layer keeps the base's and the
    adapter's output apart, and in half precision a float32 copy of each input, since adapters are float32.
    """
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", 4 * hidden)
    heads = text.num_attention_heads
    keys = hidden * getattr(text, "num_key_value_heads", heads) / heads
    kept = (16 * hidden + 3 * inner) * size
    if lora:
        kept += (3 * hidden + 2 * keys + 2 * inner) * (4.0 + size)
        kept += (6 * hidden + inner) * 4.0 if size < 4.0 else 0.0
    return float(kept)


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


def report_memory(
    job: contract.Job, model: Any, longest: int, tuning: str, frozen: int = 0, *, has_head: bool = True
) -> None:
    """Report how much of the model is trained and what the train may need, and warn if that is more than is free.

    `longest` is the longest row in tokens, `tuning` is `full`, `lora`, or another kind of adapter, `frozen` is the
    number of parameters of other models that are only used, `has_head` is false for a model that gives no logits.
    """
    counts = models.parameter_counts(model)
    parameters = {"load_in_4bit": False, **job.parameters, "tuning": tuning}
    weights = loaded_bytes(model) + frozen * _width(model)
    needed = estimate_gib(model.config, weights, counts["trainable"], longest, parameters, has_head=has_head)
    free = available_gib()
    contract.write_json(
        job.folder / "preflight.json",
        {**counts, "estimated_memory_gib": needed, "available_memory_gib": free},
    )
    job.artifact(job.folder / "preflight.json")
    expert_weights.report(job, model)
    share = counts["trainable"] / counts["total"]
    print(f"training {counts['trainable']:,} of {counts['total']:,} parameters ({share:.2%})", flush=True)
    if free is not None and needed > free:
        job.warning(
            f"this train may need {needed:.1f} GiB and {free:.1f} GiB are free: lower batch_size (raise "
            "grad_accum_steps), lower max_seq_length, or switch gradient_checkpointing on"
        )

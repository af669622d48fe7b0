"""Finds what adapter targets name in a model, and refuses before the train those that cannot be trained."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from methods.contract import Refused
from methods.toolkit.expert_weights import expert_parameters

_SHOWN = 20


def check_targets(model: Any, targets: str | Collection[str] | None, parameter: str = "lora_targets") -> None:
    """Refuse named targets that no module of the model has, and its output head. Raises Refused.

    The trainers compute the loss from the weight of the output head and pass over an adapter on it. A pattern, or
    `all-linear`, is left to the library, and so are unknown names in a mixture of experts: it reads the names that the
    experts' layers had before transformers 5.
    """
    if targets is None or isinstance(targets, str):
        return
    missing = sorted(target for target in targets if not _is_module(model, target))
    if missing and not expert_parameters(model):
        raise Refused(
            f"{parameter} names {', '.join(missing)}, which this model ({model.config.model_type}) does not have. "
            f"Its layers: {', '.join(layer_names(model))}"
        )
    head = head_name(model)
    named = [target for target in targets if head is not None and _is_named(head, target)]
    if named:
        raise Refused(
            f"{parameter} names {', '.join(named)}, the output head of this model: the loss is computed from the "
            f"weight of the head, so an adapter on it would not be trained. Remove it from {parameter}, or train all "
            "weights (method sft, tuning: full)"
        )


def split_targets(model: Any, targets: Collection[str]) -> tuple[list[str], list[str]]:
    """The targets that name modules, and those that name experts (`experts.down_proj`) by their place in a layer."""
    experts = expert_parameters(model)
    modules, parameters = [], set()
    for target in targets:
        named = {re.sub(r"^.*\.\d+\.", "", name) for name in experts if "." in target and _is_named(name, target)}
        parameters |= named
        modules += [] if named else [target]
    return modules, sorted(parameters)


def head_name(model: Any) -> str | None:
    """The name of the module that turns hidden states into logits; None where the model has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def layer_names(model: Any) -> list[str]:
    """What adapters can be put on: the last parts of the names of linear layers, input embeddings and experts."""
    import torch

    head, embedded = head_name(model), model.get_input_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name != head and (isinstance(module, torch.nn.Linear) or module is embedded)
    }
    experts = {".".join(name.split(".")[-2:]) for name in expert_parameters(model)}
    return sorted(name for name in found | experts if not name.isdecimal())[:_SHOWN]


def _is_module(model: Any, target: str) -> bool:
    return any(_is_named(name, target) for name, _ in model.named_modules())


def _is_named(name: str, target: str) -> bool:
    """Whether a target names this module, by its whole name or by its end, as peft matches them."""
    return name == target or name.endswith(f".{target}")

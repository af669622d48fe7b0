"""Finds the experts of a mixture-of-experts model that are held in one parameter a layer, and reports what skips them.

In transformers 5 such experts are parameters of three dimensions (experts, rows, columns) and not linear layers:
bitsandbytes leaves them as they are, and an adapter reaches them where its targets name them.
"""

from __future__ import annotations

from typing import Any

from methods import contract


def expert_parameters(model: Any) -> dict[str, Any]:
    """The parameters of three dimensions outside of convolutions and adapters, by their whole names."""
    import torch

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "lora_" not in name:
                found[f"{name}.{own}"] = parameter
    return found


def report(job: contract.Job, model: Any) -> None:
    """Warn of experts that 4-bit loading left unquantised, and of experts that the adapter does not train."""
    experts = expert_parameters(model)
    if not experts:
        return
    # By what they stand for: two 4-bit weights lie in one byte.
    total = sum(_elements(parameter) for name, parameter in model.named_parameters() if "lora_" not in name)
    names = ", ".join(sorted({name.rpartition(".")[2] for name in experts}))
    unquantised = [parameter for parameter in experts.values() if parameter.is_floating_point()]
    if job.parameters.get("load_in_4bit") and unquantised:
        share = sum(parameter.numel() for parameter in unquantised) / total
        size = sum(parameter.nbytes for parameter in unquantised) / 2**30
        kind = str(unquantised[0].dtype).removeprefix("torch.")
        job.warning(
            f"load_in_4bit quantises linear layers only: the experts ({names}), {share:.0%} of the weights and "
            f"{size:.3g} GiB, stay in {kind}"
        )
    frozen = _without_adapter(model, experts)
    if frozen:
        share = sum(parameter.numel() for parameter in frozen.values()) / total
        job.warning(
            f"the adapter is on linear layers only: the experts ({names}), {share:.0%} of the weights, stay as the "
            f"base has them. To train them too, add {_as_target(experts)} to lora_targets"
        )
    elif any("lora_" in name for name, _ in model.named_parameters()):
        size = sum(parameter.nbytes for parameter in experts.values()) / 2**30
        job.warning(
            f"adapters on experts make a copy of them in each step: up to {size:.3g} GiB more than estimated, with "
            "gradient_checkpointing one layer's share of it"
        )


def _as_target(experts: dict[str, Any]) -> str:
    return " and ".join(sorted({".".join(name.split(".")[-2:]) for name in experts}))


def _without_adapter(model: Any, experts: dict[str, Any]) -> dict[str, Any]:
    """The experts that are frozen and have no adapter, in a model that has adapters elsewhere."""
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    if not adapters:
        return {}
    modules = {name.partition(".lora_")[0] for name in adapters}
    return {
        name: parameter
        for name, parameter in experts.items()
        if not parameter.requires_grad and not any(name.startswith(f"{module}.") for module in modules)
    }


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if state is None else int(state.shape.numel())

"""Loads a model ready to be trained: in full, or frozen with room for LoRA beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

from methods import contract
from methods.toolkit import models, training
from methods.toolkit.adapter_targets import check_targets, split_targets


def load_trained_model(job: contract.Job, load: models.Load = models.load_model, start: str | None = None) -> Any:
    """Load the base model of the job in the dtype that it is trained in, prepared for an adapter where it is 4-bit.

    `start`: a folder whose weights it is to have instead. A method without the parameter `tuning` trains adapters only.
    """
    p = job.parameters
    in_4bit = p.get("load_in_4bit", False)  # not every method has it
    dtype = training.weights_dtype(p["dtype"], full=p.get("tuning") == "full")
    model = load(start or job.inputs["base_model"], dtype, load_in_4bit=in_4bit)
    model.config.get_text_config().use_cache = False
    if in_4bit:
        models.keep_differentiable(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=p["gradient_checkpointing"])
    return model


def lora_config(parameters: dict[str, Any], task_type: str = "CAUSAL_LM") -> LoraConfig:
    """The LoRA that the hyper-parameters ask for."""
    return LoraConfig(
        task_type=task_type,
        r=parameters["lora_rank"],
        lora_alpha=parameters["lora_alpha"],
        lora_dropout=parameters["lora_dropout"],
        target_modules=parameters["lora_targets"],
    )


def fitting_lora(model: Any, parameters: dict[str, Any], task_type: str = "CAUSAL_LM") -> LoraConfig:
    """The LoRA that the hyper-parameters ask for. Raises Refused for targets that this model cannot train."""
    return _fitted(model, lora_config(parameters, task_type))


def _fitted(model: Any, config: LoraConfig) -> LoraConfig:
    """The configuration with the experts among its targets where peft looks for them. Raises Refused."""
    if config.target_modules is None or isinstance(config.target_modules, str):
        return config
    modules, experts = split_targets(model, config.target_modules)
    check_targets(model, modules)
    if experts and config.lora_dropout:
        raise contract.Refused(
            f"lora_dropout is {config.lora_dropout:g}, and lora_targets names experts ({', '.join(experts)}), whose "
            "adapters have no dropout: set lora_dropout to 0"
        )
    return replace(config, target_modules=modules, target_parameters=experts or config.target_parameters)


def add_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Put the adapter on top of the model. Raises Refused where the model lacks one of its targets."""
    config = _fitted(model, config)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        wanted = config.target_modules
        named = sorted(wanted) if isinstance(wanted, set) else wanted
        raise contract.Refused(f"lora_targets {named!r} do not fit this model: {error}") from error


def load_reference(job: contract.Job) -> Any:
    """Load the base model once more, as what a fully trained model is measured against."""
    reference = models.load_model(job.inputs["base_model"], training.weights_dtype(job.parameters["dtype"], full=True))
    switch_dropout_off(reference)
    return reference


def switch_dropout_off(model: Any) -> None:
    """Switch the dropout of the model's own layers off: two passes over one text have to agree.

    Done before an adapter is put on, whose own dropout is a hyper-parameter.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def keep_adapter_precise(model: Any) -> None:
    """Hold what is trained on top of a 4-bit base in float32.

    trl makes it bfloat16, in which the small updates of a low learning rate are rounded away.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what the engine says of settings that do not fit each other or the model into Refused."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise contract.Refused(f"this model cannot be trained with these parameters: {error}") from error

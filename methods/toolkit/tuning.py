"""Loads a causal language model ready to be trained: in full, or frozen with room for LoRA beside it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

from methods import contract
from methods.toolkit import models, training


def load_trained_model(job: contract.Job) -> Any:
    """Load the base model of the job in the dtype that it is trained in, prepared for an adapter where it is 4-bit."""
    p = job.parameters
    dtype = training.weights_dtype(p["dtype"], full=p["tuning"] == "full")
    model = models.load_model(job.inputs["base_model"], dtype, load_in_4bit=p["load_in_4bit"])
    model.config.use_cache = False
    if p["load_in_4bit"]:
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


def add_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Put the adapter on top of the model. Raises Refused where the model has none of its targets."""
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        wanted = config.target_modules
        named = sorted(wanted) if isinstance(wanted, set) else wanted
        raise contract.Refused(f"lora_targets {named!r} do not fit this model: {error}") from error

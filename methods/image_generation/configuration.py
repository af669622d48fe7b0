"""What SimpleTuner is told: its two configuration files, made of the parameters of a job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGURATION = "config.json"
DATA = "multidatabackend.json"
METRICS = "training_metrics.jsonl"
STATUS = "training_metrics.json"
SAMPLES = "validation_images"
IMAGES = "images"
"""What SimpleTuner calls the images of the train. It keeps how far it is with them in `training_state-ID.json`, but
writes it over `training_state.json` if that holds the id, as it does "train": the step that was reached is lost."""
SAMPLER = f"training_state-{IMAGES}.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"

_OPTIMIZERS = {
    ("adamw", "float32"): "torch-adamw",
    ("adamw", "bfloat16"): "adamw_bf16",
    ("sgd", "float32"): "torch-sgd",
    ("sgd", "bfloat16"): "torch-sgd",
}
_PRECISION = {"float32": ("no", "fp32"), "bfloat16": ("bf16", "bf16")}


@dataclass(frozen=True)
class Place:
    """Where a train works: `work` holds its own copies of images, and everything that is computed of them."""

    work: Path
    checkpoints: Path
    base_model: Path

    @property
    def images(self) -> Path:
        """The images to train on, each with its caption beside it."""
        return self.work / "images"

    @property
    def held_back(self) -> Path:
        """The images that only the validation loss is taken on."""
        return self.work / "validation"


def steps_per_epoch(rows: int, parameters: dict[str, Any]) -> int:
    """Optimizer steps in which every image is trained on as often as it is to be."""
    batch = parameters["batch_size"] * parameters["grad_accum_steps"]
    return max(1, math.ceil(int(rows * parameters["repeats"]) / int(batch)))


def total_steps(rows: int, parameters: dict[str, Any]) -> int:
    """Optimizer steps of the whole train."""
    return int(parameters["max_steps"] or math.ceil(steps_per_epoch(rows, parameters) * parameters["epochs"]))


def training_configuration(
    place: Place, parameters: dict[str, Any], rows: int, first_caption: str, *, validation: bool, resume: str | None
) -> dict[str, Any]:
    """The options of the train. `parameters` have a `dtype` that is chosen; `resume` is the name of a checkpoint."""
    p = parameters
    precision, weights = _PRECISION[p["dtype"]]
    every = p["evaluation_steps"] or steps_per_epoch(rows, p)
    configuration = {
        "model_family": p["model_family"],
        "model_type": p["tuning"],
        "pretrained_model_name_or_path": str(place.base_model),
        "pretrained_vae_model_name_or_path": str(place.base_model),  # or it is looked for on the hub
        "data_backend_config": str(place.work / DATA),
        "output_dir": str(place.checkpoints),
        "logging_dir": str(place.work / "logs"),
        "cache_dir": str(place.work / "cache"),
        "report_to": "simpletuner",
        "seed": p["seed"],
        "resolution": p["resolution"],
        "resolution_type": "pixel_area",
        "aspect_bucket_rounding": 2,
        "minimum_image_size": p["minimum_image_size"],
        "caption_dropout_probability": p["caption_dropout"],
        "train_batch_size": p["batch_size"],
        "gradient_accumulation_steps": p["grad_accum_steps"],
        "max_train_steps": total_steps(rows, p),
        "num_train_epochs": 0,
        "gradient_checkpointing": p["gradient_checkpointing"],
        "mixed_precision": precision,
        "base_model_default_dtype": weights,
        "vae_dtype": weights,
        "optimizer": _OPTIMIZERS[p["optimizer"], p["dtype"]],
        "optimizer_config": f"weight_decay={float(p['weight_decay'])!r}",
        "learning_rate": p["learning_rate"],
        **schedule(p, total_steps(rows, p)),
        "grad_clip_method": "norm",
        "max_grad_norm": p["max_grad_norm"],
        # Only the evaluation loss takes steps of this schedule, in bfloat16, where 999 is 1000, which there is not.
        "training_scheduler_timestep_spacing": "leading",
        "use_ema": p["use_ema"],
        "ema_decay": p["ema_decay"],
        "checkpoint_step_interval": p["checkpoint_steps"],
        # One more than are kept: the oldest is removed when the newest is whole, and not before it is written.
        "checkpoints_total_limit": p["keep_checkpoints"] + 1,
        "checkpointing_use_tempdir": True,
        "resume_from_checkpoint": resume,
        "validation_prompt": p["validation_prompt"] or first_caption,
        "validation_negative_prompt": p["validation_negative_prompt"],
        "validation_prompt_library": False,
        "validation_step_interval": every,
        "validation_num_inference_steps": p["validation_steps"],
        "validation_guidance": p["validation_guidance"],
        "validation_resolution": picture_size(p),
        "validation_seed": p["seed"],
        "num_validation_images": p["num_generations"],
    }
    if validation:
        configuration["eval_steps_interval"] = every
    if p["tuning"] == "lora":
        configuration |= {
            "lora_type": "standard",
            "lora_rank": p["lora_rank"],
            "lora_alpha": p["lora_alpha"],
            "lora_dropout": p["lora_dropout"],
        }
    return {name: value for name, value in configuration.items() if value is not None}


def schedule(parameters: dict[str, Any], total: int) -> dict[str, Any]:
    """The learning rate's schedule: linear and polynomial (of degree 2) end at learning_rate × lr_decay_ratio."""
    p = parameters
    warmup = p["warmup_steps"] if p["warmup_steps"] is not None else math.ceil(p["warmup_ratio"] * total)
    falls = p["lr_scheduler"] in ("linear", "polynomial") and p["lr_decay_ratio"] < 1
    if not falls:
        constant = "constant" if p["lr_scheduler"] == "constant" else "constant_with_warmup"
        return {"lr_scheduler": constant, "lr_warmup_steps": warmup}
    return {
        "lr_scheduler": "polynomial",
        "lr_warmup_steps": warmup,
        "lr_power": 1.0 if p["lr_scheduler"] == "linear" else 2.0,
        "lr_end": p["learning_rate"] * p["lr_decay_ratio"],
    }


def picture_size(parameters: dict[str, Any]) -> str:
    """Width x height of the pictures that the model makes."""
    return str(parameters["validation_resolution"] or f"{parameters['resolution']}x{parameters['resolution']}")


def data_configuration(
    place: Place, parameters: dict[str, Any], *, validation: bool, on_gpu: bool
) -> list[dict[str, Any]]:
    """Where the images, their captions and what is computed of them lie."""
    cache = place.work / "cache"
    images = _images(parameters, on_gpu=on_gpu)
    train = {"id": IMAGES, "dataset_type": "image", "instance_data_dir": str(place.images)}
    held_back = {"id": "validation", "dataset_type": "eval", "instance_data_dir": str(place.held_back)}
    found = [{**train, "repeats": parameters["repeats"] - 1, "cache_dir_vae": str(cache / "train"), **images}]
    if validation:
        found.append({**held_back, "cache_dir_vae": str(cache / "validation"), **images})
    texts = {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True}
    return [*found, {**texts, "cache_dir": str(cache / "texts")}]


def _images(parameters: dict[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    p = parameters
    square = {"crop": True, "crop_aspect": "square", "crop_style": p["crop"]}
    return {
        "type": "local",
        "caption_strategy": "textfile",
        "resolution": p["resolution"],
        "resolution_type": "pixel_area",
        "minimum_image_size": p["minimum_image_size"],
        **({"crop": False} if p["crop"] == "keep" else square),
        # Latents kept on disk are pinned for the GPU when they are read, which fails where there is none.
        **({} if on_gpu else {"vae_cache_ondemand": True}),
    }

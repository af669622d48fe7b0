"""Loads models that read images, and their processors; says which of their weights are the language model's."""

from __future__ import annotations

import math
import re
import sys
from importlib.util import find_spec
from typing import Any

from methods.contract import Job, Refused
from methods.toolkit import models, remote_code


def load_processor(path: str) -> tuple[Any, list[str]]:
    """Load the processor of a model folder or hub id: its tokenizer, and what makes pixel values of images.

    Returns the processor and what had to be added to it, one sentence each. Raises Refused for a model without one,
    without an end token, and for one whose processor needs a package that this environment does not have.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, **remote_code.loading(path))
    except (ImportError, AttributeError, OSError, ValueError) as error:
        if find_spec("torchvision") is None and not isinstance(error, OSError):
            raise Refused(_needs_torchvision(path, error)) from error
        raise Refused(f"cannot load the processor of {path}: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise Refused(f"{path} has no image processor: it is no vision-language model")
    tokenizer, added = processor.tokenizer, []
    if tokenizer.eos_token_id is None:
        raise Refused(f"the tokenizer of {path} names no eos_token; add one to its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        added.append(f"the tokenizer has no pad token: {tokenizer.eos_token!r} is used")
    if processor.chat_template is None:
        raise Refused(f"{path} has no chat template, so it does not say where an image stands in a conversation")
    return processor, added


def _needs_torchvision(path: str, error: Exception) -> str:
    import torch

    return (
        f"cannot load the processor of {path}: {error}. Models that also read videos (Qwen2-VL, Qwen2.5-VL, SmolVLM "
        f"and their kind) need torchvision, which the environment {sys.prefix} does not have: install the release "
        f"that belongs to its torch {torch.__version__} with `{sys.executable} -m pip install torchvision`, or "
        "`pip install -c constraints.txt -e '.[vision]'` in Tuneline's own folder"
    )


def limit_images(processor: Any, smallest: int | None, largest: int | None) -> None:
    """Have the processor scale images so that they have `smallest` to `largest` pixels, as far as it lets itself.

    It is saved with the model, so that later stages and servers scale as training did. None leaves its own limit.
    Raises Refused for a limit that it does not take.
    """
    if smallest is None and largest is None:
        return
    sizes = dict(processor.image_processor.size)
    if smallest is not None and largest is not None and smallest > largest:
        raise Refused(f"image_min_pixels ({smallest}) is more than image_max_pixels ({largest})")
    if not sizes.get("longest_edge"):
        raise Refused(
            f"the processor of this model brings every image to one size ({_told(sizes)}): leave image_max_pixels and "
            "image_min_pixels out"
        )
    if hasattr(processor.image_processor, "merge_size"):  # Qwen2-VL and its kind: what is called an edge is an area
        sizes["shortest_edge"] = sizes["shortest_edge"] if smallest is None else smallest
        sizes["longest_edge"] = sizes["longest_edge"] if largest is None else largest
    elif smallest is not None:
        raise Refused("the processor of this model has no smallest size of an image: leave image_min_pixels out")
    elif largest is not None:
        sizes["longest_edge"] = min(sizes["longest_edge"], math.isqrt(largest))
    processor.image_processor.size = type(processor.image_processor.size)(**sizes)


def _told(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)


def first_weights(job: Job) -> str:
    """Where a trained model's weights are loaded from: the base, or in full tuning the checkpoint that it goes on from.

    The library puts a checkpoint's weights into a loaded model by their names in the file, and leaves out in silence
    those that the model calls otherwise, as models with a vision part do.
    """
    full = job.parameters["tuning"] == "full"
    return str(job.resume_from) if full and job.resume_from else str(job.inputs["base_model"])


def load_model(path: str, dtype: str, *, load_in_4bit: bool = False) -> Any:
    """Load a model of images and text from a folder or hub id, on the GPU where there is one.

    Raises Refused if the model cannot be loaded as one (with what the library said).
    """
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, **remote_code.loading(path), **models.loading(dtype, load_in_4bit)
        )
    except (OSError, ValueError) as error:
        raise Refused(f"cannot load {path} as a model of images and text: {error}") from error


def load_with_adapter(base: str, adapter: str | None, dtype: str) -> Any:
    """Load an unquantised base model, with the adapter on top of it if one is given, in evaluation mode."""
    return models.load_with_adapter(base, adapter, dtype, load_model)


def language_model(model: Any) -> tuple[str, Any]:
    """The part of a model that reads and writes text: its name inside the model, and the module. Raises Refused."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name:
        raise Refused(f"{type(model).__name__} does not tell its language model from the part that reads images")
    return name, decoder


def language_targets(model: Any, targets: str | list[str]) -> str:
    """The modules of the language model, and of it alone, that get an adapter, as peft takes them: an expression.

    `targets` is `all-linear` or names of modules. Raises Refused if the language model has none of that name.
    """
    import torch

    prefix, decoder = language_model(model)
    linear = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    wanted = sorted(linear) if targets == "all-linear" else list(targets)
    names = "|".join(re.escape(name) for name in wanted)
    if not any(re.fullmatch(rf"(.*\.)?({names})", name) for name, _ in decoder.named_modules()):
        raise Refused(f"lora_targets {targets!r} are no modules of this language model; it has {sorted(linear)}")
    return rf"{re.escape(prefix)}\.(.*\.)?({names})"


def freeze_vision(model: Any) -> None:
    """Leave the language model and its output layer to be trained, and nothing else."""
    model.requires_grad_(False)
    language_model(model)[1].requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)

"""Loads base models and adapters, and says what they weigh."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods.contract import Refused
from methods.toolkit import chat, hardware, remote_code

Load = Callable[..., Any]
"""Loads a model of some kind from a path, in a dtype, in 4 bit where that is asked for."""


def choose_dtype(name: str, device: hardware.Device | None = None) -> Any:
    """The torch dtype of a `dtype` parameter; `hardware.resolve_dtype` says what `auto` is on the device."""
    import torch

    return getattr(torch, hardware.resolve_dtype(name, device))


def load_model(path: str, dtype: str, *, load_in_4bit: bool = False) -> Any:
    """Load a causal language model from a folder or hub id, on the GPU where there is one.

    Raises Refused if the model cannot be loaded as one (with what the library said).
    """
    from transformers import AutoModelForCausalLM

    try:
        with remote_code.explained(path):
            own = remote_code.loading(path)
            model = AutoModelForCausalLM.from_pretrained(path, **own, **loading(dtype, load_in_4bit))
            if own["trust_remote_code"]:
                settle_cache(model)
            return model
    except (OSError, ValueError) as error:
        raise Refused(f"cannot load {path} as a causal language model: {error}") from error


def settle_cache(model: Any) -> None:
    """Let a model generate without a cache if its own code does not take the library's cache objects.

    Code of before transformers 4.36 reads the cache as nested tuples. The setting is saved with the model.
    """
    import torch
    from transformers import DynamicCache

    # Older code loaded a second time in one process has no `generate`: transformers adds it at the first load only.
    if not hasattr(model, "generation_config"):
        return
    keep_differentiable(model)
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except (TypeError, AttributeError, LookupError, ValueError):
        model.generation_config.use_cache = False


def load_scorer(path: str, dtype: str, *, load_in_4bit: bool = False) -> Any:
    """Load a model with one number as its output: a reward model, or a base model under a new random head.

    The global generator decides the head. The score is read at the last token that is not the pad token of the
    model's tokenizer, whether or not the base names one. Raises Refused if the model cannot be loaded as one.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # else it advises to train a base model's head, which is what is about to happen
    try:
        with remote_code.explained(path):
            found = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, **remote_code.loading(path), **loading(dtype, load_in_4bit)
            )
    except (OSError, ValueError) as error:
        raise Refused(f"cannot load {path} as a reward model: {_why_no_scorer(path, error)}") from error
    finally:
        logging.set_verbosity(told)
    found.config.get_text_config().pad_token_id = chat.load_tokenizer(path)[0].pad_token_id
    return found


def _why_no_scorer(path: str, error: Exception) -> str:
    """What to say of a model that cannot be loaded under a head of one number."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if isinstance(error, OSError):  # files are missing or damaged
        return str(error)
    kind = AutoConfig.from_pretrained(path, **remote_code.loading(path)).model_type
    if kind in KNOWN:
        return str(error)
    return (
        f"the library has no sequence classification for models of the type {kind}. Choose a base model of another "
        "family, such as Llama, Qwen2.5, Qwen3, Mistral or Gemma."
    )


def loading(dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    """How every kind of model is loaded: in its dtype, on the GPU where there is one, safetensors only."""
    import torch
    from transformers import BitsAndBytesConfig

    chosen = choose_dtype(dtype)
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=chosen,
        )
    return {
        "dtype": chosen,
        "quantization_config": quantization,
        "device_map": {"": 0} if torch.cuda.is_available() else None,
        "use_safetensors": True,
    }


def keep_differentiable(model: Any) -> None:
    """Let gradients pass through 4-bit weights on a CPU after an evaluation as well.

    At the first forward pass outside of training, bitsandbytes 0.50 packs the weights anew for a kernel that has no
    backward pass; training then goes on without the gradients of the layers below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_with_adapter(base: str, adapter: str | None, dtype: str, load: Load = load_model) -> Any:
    """Load an unquantised base model, with the adapter on top of it if one is given, in evaluation mode."""
    model = load(base, dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def save_trained(model: Any, folder: Path) -> None:
    """Save what training leaves: the adapter of a model that has one, else the whole model.

    An adapter on the embeddings is saved without the base's embeddings, which it does not change.
    """
    from peft import PeftModel

    alone = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, **alone)


def parameter_counts(model: Any) -> dict[str, int]:
    """Number of all and of trained parameters (4-bit weights counted as what they stand for)."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
        return {"trainable": trained, "total": total}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable": trained, "total": sum(p.numel() for p in model.parameters())}


def relocate_adapter(adapter: Path, base: str) -> None:
    """Name `base` in the adapter's own configuration, so that the folder loads wherever it is opened."""
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")

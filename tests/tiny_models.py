"""Random models of a few thousand parameters, made on the spot, for tests of everything around a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from methods.toolkit.tiny_models import make_tiny_chat_model

__all__ = ["greedy_answer", "make_tiny_adapter", "make_tiny_chat_model", "prompt_tokens"]


def make_tiny_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Save a LoRA adapter (rank 4, all attention projections, random A and B) for the base model's folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # Random from the start: an adapter that changes nothing could not be told from its base.
    config = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def prompt_tokens(folder: Path, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of the messages with the generation prompt, by the folder's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def greedy_answer(
    folder: Path, messages: Sequence[dict[str, str]], max_new_tokens: int, adapter: Path | None = None
) -> str:
    """What the model (with the adapter, if given) answers greedily, decoded without special tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt_tokens(folder, messages)])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

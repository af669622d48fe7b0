"""The model families: what each has, and a tiny random model of it in the family's public format.

A model has two layers of hidden size 64 of the family's own architecture, a byte-level BPE made on the spot with the
family's special tokens, its chat template, and its `generation_config`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.families import templates


@dataclass(frozen=True)
class Family:
    """A family of chat models in its public format.

    `architecture`: the transformers classes' common name (`Qwen2` for Qwen2Config and Qwen2ForCausalLM).
    `template`: None for a base model without one.
    `markers`: special tokens of the template; `words`: added tokens that are not special, such as `<think>`.
    `adds_bos`: the tokenizer itself puts the BOS before a text.
    `generation`: its `generation_config.json`, tokens by name.
    `ends`: the tokens that may end an answer; `call_ends`: those that may end a tool call, where they are others.
    `system`: takes a system message (`merged`: its template refuses one, so it goes into the first user turn).
    `thinking`, `tools`: the template renders thoughts, shows tools.
    `dated`: the template prints today's date.
    `rewrites`: the template shows an earlier answer otherwise than the last one, even one without a thought.
    """

    name: str
    architecture: str
    template: str | None
    markers: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    bos: str | None = None
    pad: str | None = None
    words: tuple[str, ...] = ()
    adds_bos: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    system: str = "own"
    thinking: bool = False
    tools: bool = False
    call_ends: tuple[str, ...] = ()
    dated: bool = False
    rewrites: bool = False

    @property
    def tool_ends(self) -> tuple[str, ...]:
        """The tokens that may end a tool call."""
        return self.call_ends or self.ends


_SAMPLED = {"do_sample": True}
_QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_QWEN_TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_QWEN_SAMPLING = {**_SAMPLED, "eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>"}
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MISTRAL = ("<unk>", "<s>", "</s>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_DEEPSEEK_TURNS = ("<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK_TOOLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in (
        *("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"),
        *("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"),
    )
)
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

FAMILIES = (
    Family(
        name="Qwen2.5 instruct",
        architecture="Qwen2",
        template=templates.published("qwen2_5"),
        markers=_QWEN,
        words=_QWEN_TOOLS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>",),
        generation={**_QWEN_SAMPLING, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        tools=True,
    ),
    Family(
        name="Qwen2.5 base",
        architecture="Qwen2",
        template=templates.published("qwen2_5"),
        markers=_QWEN,
        words=_QWEN_TOOLS,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>",),
        generation={"do_sample": False, "max_new_tokens": 2048, "eos_token_id": "<|endoftext|>"},
        tools=True,
    ),
    Family(
        name="Qwen3",
        architecture="Qwen3",
        template=templates.published("qwen3"),
        markers=_QWEN,
        words=(*_QWEN_TOOLS, *_THINK),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>",),
        generation={**_QWEN_SAMPLING, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
        config={"head_dim": 16, "tie_word_embeddings": True},
        thinking=True,
        tools=True,
        rewrites=True,
    ),
    Family(
        name="Qwen3-MoE",
        architecture="Qwen3Moe",
        template=templates.published("qwen3"),
        markers=_QWEN,
        words=(*_QWEN_TOOLS, *_THINK),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>",),
        generation={**_QWEN_SAMPLING, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
        config={**_MOE, "num_experts": 4, "head_dim": 16},
        thinking=True,
        tools=True,
        rewrites=True,
    ),
    Family(
        name="Llama-3",
        architecture="Llama",
        template=templates.published("llama3"),
        markers=_LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|eot_id|>",),
        adds_bos=True,
        generation={
            **_SAMPLED,
            "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"],
            "temperature": 0.6,
            "top_p": 0.9,
        },
    ),
    Family(
        name="Llama-3.2",
        architecture="Llama",
        template=templates.published("llama3_2"),
        markers=(*_LLAMA3, "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|eot_id|>",),
        adds_bos=True,
        generation={
            **_SAMPLED,
            "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
            "temperature": 0.6,
            "top_p": 0.9,
        },
        config={"tie_word_embeddings": True},
        tools=True,
        dated=True,
    ),
    Family(
        name="Llama base",
        architecture="Llama",
        template=None,
        markers=("<|begin_of_text|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        ends=("<|end_of_text|>",),
        adds_bos=True,
        generation={**_SAMPLED, "eos_token_id": "<|end_of_text|>", "temperature": 0.6, "top_p": 0.9},
    ),
    Family(
        name="Mistral v0.2",
        architecture="Mistral",
        template=templates.MISTRAL_V02,
        markers=_MISTRAL,
        bos="<s>",
        eos="</s>",
        ends=("</s>",),
        adds_bos=True,
        generation={"eos_token_id": "</s>"},
        system="merged",
    ),
    Family(
        name="Mixtral",
        architecture="Mixtral",
        template=templates.MIXTRAL,
        markers=_MISTRAL,
        bos="<s>",
        eos="</s>",
        ends=("</s>",),
        adds_bos=True,
        generation={"eos_token_id": "</s>"},
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
        system="merged",
    ),
    Family(
        name="Gemma-2",
        architecture="Gemma2",
        template=templates.published("gemma"),
        markers=_GEMMA,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        ends=("<end_of_turn>",),
        adds_bos=True,
        generation={"eos_token_id": ["<eos>", "<end_of_turn>"], "pad_token_id": "<pad>"},
        config={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 256},
        system="merged",
    ),
    Family(
        name="Gemma-3",
        architecture="Gemma3",
        template=templates.published("gemma3"),
        markers=_GEMMA,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        ends=("<end_of_turn>",),
        adds_bos=True,
        generation={
            **_SAMPLED,
            "eos_token_id": ["<eos>", "<end_of_turn>"],
            "pad_token_id": "<pad>",
            "top_k": 64,
            "top_p": 0.95,
        },
        config={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 256},
    ),
    Family(
        name="Phi-3",
        architecture="Phi3",
        template=templates.published("phi3"),
        markers=("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        ends=("<|end|>",),
        generation={"eos_token_id": ["<|endoftext|>", "<|assistant|>", "<|end|>"], "pad_token_id": "<|endoftext|>"},
    ),
    Family(
        name="GLM-4.5",
        architecture="Glm4Moe",
        template=templates.published("glm4moe"),
        markers=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        words=(
            *_THINK,
            *_QWEN_TOOLS,
            *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
        ),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        ends=("<|user|>",),
        call_ends=("<|observation|>",),
        generation={"eos_token_id": ["<|endoftext|>", "<|user|>", "<|observation|>"], "pad_token_id": "<|endoftext|>"},
        config={
            **_MOE,
            "head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
        },
        thinking=True,
        tools=True,
    ),
    Family(
        name="gpt-oss",
        architecture="GptOss",
        template=templates.published("gptoss"),
        markers=(
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>"),
            *("<|end|>", "<|message|>", "<|call|>"),
        ),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
        ends=("<|return|>",),
        call_ends=("<|call|>",),
        generation={
            **_SAMPLED,
            "eos_token_id": ["<|return|>", "<|endoftext|>", "<|call|>"],
            "pad_token_id": "<|endoftext|>",
        },
        config={"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 256},
        thinking=True,
        tools=True,
        dated=True,
        rewrites=True,
    ),
    Family(
        name="DeepSeek-R1 distill",
        architecture="Qwen2",
        template=templates.published("deepseek_r1_distill"),
        markers=_DEEPSEEK,
        words=(*_DEEPSEEK_TURNS, *_DEEPSEEK_TOOLS, *_THINK),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        ends=("<｜end▁of▁sentence｜>",),
        adds_bos=True,
        generation={**_SAMPLED, "eos_token_id": "<｜end▁of▁sentence｜>", "temperature": 0.6, "top_p": 0.95},
        thinking=True,
        rewrites=True,
    ),
    Family(
        name="DeepSeek-V3",
        architecture="DeepseekV3",
        template=templates.published("deepseekv3"),
        markers=_DEEPSEEK,
        words=(*_DEEPSEEK_TURNS, *_DEEPSEEK_TOOLS, *_THINK),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        ends=("<｜end▁of▁sentence｜>",),
        adds_bos=True,
        generation={**_SAMPLED, "eos_token_id": "<｜end▁of▁sentence｜>", "temperature": 0.6, "top_p": 0.95},
        config={
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        thinking=True,
        rewrites=True,
    ),
    Family(
        name="Command-R",
        architecture="Cohere",
        template=templates.published("cohere"),
        markers=(
            *("<PAD>", "<UNK>", "<EOS_TOKEN>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        ends=("<|END_OF_TURN_TOKEN|>",),
        adds_bos=True,
        generation={"eos_token_id": "<|END_OF_TURN_TOKEN|>", "pad_token_id": "<PAD>"},
        config={"logit_scale": 1.0},
    ),
    Family(
        name="Yi",
        architecture="Llama",
        template=templates.CHATML,
        markers=("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<unk>",
        ends=("<|im_end|>",),
        generation={**_SAMPLED, "eos_token_id": "<|im_end|>", "pad_token_id": "<unk>", "top_p": 0.8},
    ),
    Family(
        name="Granite",
        architecture="Granite",
        template=templates.GRANITE,
        markers=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        ends=("<|end_of_text|>",),
        generation={"eos_token_id": "<|end_of_text|>", "pad_token_id": "<|end_of_text|>"},
        tools=True,
        dated=True,
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # wide enough for a greedy choice to be far from a tie
}
_TEXT_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_TOKENS_OF_TEXT = 640


def make_tokenizer(family: Family) -> Any:
    """A byte-level BPE with the family's special tokens, padding, BOS and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS_OF_TEXT,
        special_tokens=list(family.markers),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([family.template or "", "switch the light in the kitchen on and off"], trainer)
    inner.add_tokens([AddedToken(word, special=False, normalized=False) for word in family.words])
    if family.adds_bos and family.bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, inner.token_to_id(family.bos))],
        )
    named = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **{name: token for name, token in named.items() if token is not None}
    )
    tokenizer.chat_template = family.template
    return tokenizer


def save_tokenizer(family: Family, folder: Path) -> Path:
    """Save the tokenizer and the `generation_config.json` of the family, and no weights."""
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_settings(family, tokenizer)))
    return folder


def generation_settings(family: Family, tokenizer: Any) -> dict[str, Any]:
    """The family's `generation_config.json`, its tokens as ids."""
    settings = {"bos_token_id": family.bos, **family.generation} if family.bos else family.generation
    return {name: _ids(tokenizer, value) if name.endswith("_token_id") else value for name, value in settings.items()}


def make_model(family: Family, folder: Path, seed: int = 1) -> Path:
    """Save a random model of the family (float32) with its tokenizer and generation settings."""
    import torch
    import transformers

    tokenizer = make_tokenizer(family)
    config_class = getattr(transformers, _TEXT_CONFIGS.get(family.architecture, f"{family.architecture}Config"))
    settings = generation_settings(family, tokenizer)
    config = config_class(
        **{**_SIZES, **family.config},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=settings["eos_token_id"],
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.architecture}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def _ids(tokenizer: Any, tokens: str | list[str]) -> int | list[int]:
    ids: int | list[int] = tokenizer.convert_tokens_to_ids(tokens)
    return ids

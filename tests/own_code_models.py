"""A tiny model that brings its own code, in the manner of Baichuan2: fused projections, a tokenizer in Python, no
chat template but ids of turn tokens, weights in pytorch_model-*.bin. All of it is written for these tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGURATION = '''
from transformers import LlamaConfig


class PackedConfig(LlamaConfig):
    """A Llama whose projections to queries, keys and values are one matrix."""

    model_type = "packed_llama"
'''

MODELING = '''
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from .configuration_packed import PackedConfig


class PackedAttention(LlamaAttention):
    """Attention with one projection, W_pack (hidden, 3 * hidden)."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(self, hidden_states, *given, **named):
        query, key, value = self.W_pack(hidden_states).chunk(3, dim=-1)
        self.q_proj, self.k_proj, self.v_proj = (lambda _: query), (lambda _: key), (lambda _: value)
        return super().forward(hidden_states, *given, **named)


class PackedForCausalLM(LlamaForCausalLM):
    """A causal language model with packed attention."""

    config_class = PackedConfig

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = PackedAttention(config, number)
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, **named):
        if past_key_values is not None:
            past_key_values[0][0].shape  # as code of before the cache objects reads it
        return super().forward(input_ids, past_key_values=past_key_values, **named)
'''

TOKENIZATION = '''
import json
import os

from transformers import PreTrainedTokenizer


class PackedTokenizer(PreTrainedTokenizer):
    """A token for every character of a list."""

    vocab_files_names = {"vocab_file": "letters.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **named):
        with open(vocab_file, encoding="utf-8") as file:
            self.ids = json.load(file)
        self.letters = {number: letter for letter, number in self.ids.items()}
        super().__init__(**named)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **named):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.ids["<unk>"])

    def _convert_id_to_token(self, index):
        return self.letters.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = os.path.join(save_directory, "letters.json")
        with open(target, "w", encoding="utf-8") as file:
            json.dump(self.ids, file)
        return (target,)
'''

FILES = {
    "configuration_packed.py": CONFIGURATION,
    "modeling_packed.py": MODELING,
    "tokenization_packed.py": TOKENIZATION,
}
AUTO_MAP = {
    "AutoConfig": "configuration_packed.PackedConfig",
    "AutoModelForCausalLM": "modeling_packed.PackedForCausalLM",
}
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
_SPECIAL = ["<unk>", "<s>", "</s>", USER, ASSISTANT]


def write_code(folder: Path, **configuration: Any) -> Path:
    """Write the code and configurations of the model, without weights and vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text.lstrip(), encoding="utf-8")
    content = {"model_type": "packed_llama", "auto_map": AUTO_MAP, **configuration}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "PackedTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_packed.PackedTokenizer", None]},
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": [USER, ASSISTANT],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def make_packed_model(folder: Path, seed: int = 1) -> Path:
    """Write the whole model, its weights as two pytorch_model-*.bin files with an index.

    None of its code is run: the weights are those of a plain Llama of 2 layers, hidden size 64, packed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = [*_SPECIAL, *map(chr, range(32, 127)), "\n"]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    own = {"architectures": ["PackedForCausalLM"], "model_type": "packed_llama", "auto_map": AUTO_MAP}
    write_code(folder, **{**json.loads(config.to_json_string(use_diff=False)), **own})
    (folder / "letters.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    turns = {"user_token_id": letters.index(USER), "assistant_token_id": letters.index(ASSISTANT)}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, **turns}))
    weights = _packed(LlamaForCausalLM(config).state_dict())
    _save_sharded(folder, weights)
    return folder


def _packed(weights: dict[str, Any]) -> dict[str, Any]:
    import torch

    packed = {}
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            packed[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            packed[name] = tensor
    return packed


def _save_sharded(folder: Path, weights: dict[str, Any]) -> None:
    import torch

    names = sorted(weights)
    halves = [names[::2], names[1::2]]
    placed = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name].clone() for name in half}, folder / file)
        placed |= dict.fromkeys(half, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")

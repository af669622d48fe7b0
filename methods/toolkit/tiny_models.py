"""A tiny chat model and a few rows, made on the spot: what the check of a method runs its stages with.

Run as: python tiny_models.py FOLDER KIND   (KIND: chat, preference or ranking)

A method of another type, or one that needs more, has a file `check.py` that leaves the same in FOLDER:
`base_model/`, `train_rows.jsonl`, `validation_rows.jsonl`, `requests.jsonl` (what its inference stages are asked),
`parameters.json` (what the job is given instead of defaults; paths of files from FOLDER) and, if it takes models,
`models.json` (by parameter, as a stage finds them in its inputs; paths from FOLDER).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROOMS = ("kitchen", "hall", "cellar", "garden", "attic", "office", "bath")


def make_tiny_chat_model(folder: Path, seed: int) -> Path:
    """Save a 2-layer Llama (hidden size 64, float32) with a byte-level BPE tokenizer and a ChatML template.

    The seed decides the weights only: models of different seeds share one tokenizer and answer differently.
    As in SmolLM2, the padding token is the end token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _chat_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,  # wide enough for a greedy choice to be far from a tie
            bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Bytes that are no character by themselves are never chosen: streamed and whole answers would be decoded
    # apart.
    with torch.no_grad():
        for token in range(len(tokenizer)):
            if "\ufffd" in tokenizer.decode([token]):
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_reward_model(base: Path, folder: Path, seed: int) -> Path:
    """Save the base model under a random head that gives one score, with its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _chat_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["system user assistant switch the light in the kitchen on and off"], trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = CHATML
    return fast


def chat_rows(count: int, kind: str) -> list[dict[str, Any]]:
    """Rows of a kind that a chat model is trained on, each about a light in one of seven rooms."""
    return [_row(number, kind) for number in range(count)]


def _row(number: int, kind: str) -> dict[str, Any]:
    room, answer = ROOMS[number % 7], ("on", "off")[number % 2]
    prompt = [{"role": "user", "content": f"switch the light {number} in the {room} {answer}"}]
    right, wrong = f"{room} {answer}", f"{ROOMS[(number + 3) % 7]} is dark"
    if kind == "preference":
        said = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
        return {"line": number + 1, "prompt": prompt, "chosen": said[0], "rejected": said[1]}
    if kind == "ranking":
        return {"line": number + 1, "prompt": prompt, "answers": [wrong, right, "no"], "scores": [1.0, 2.0, 0.0]}
    return {"line": number + 1, "messages": [*prompt, {"role": "assistant", "content": right}]}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path, kind: str) -> None:
    """Leave in the folder what the check of a chat method needs."""
    make_tiny_chat_model(folder / "base_model", seed=1)
    rows = chat_rows(30, kind)
    write_rows(folder / "train_rows.jsonl", rows[:24])
    write_rows(folder / "validation_rows.jsonl", rows[24:])
    asked = [row["messages"][:-1] for row in chat_rows(3, "chat")]
    write_rows(folder / "requests.jsonl", [{"messages": messages} for messages in asked])
    (folder / "parameters.json").write_text("{}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

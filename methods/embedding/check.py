"""Makes a tiny encoder and rows of it, for `tuneline methods check embedding`.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WORDS = "alarm pump valve rotor sensor belt replace tighten clean check the and restart line what to do when shows"


def make_tiny_encoder(folder: Path, seed: int) -> Path:
    """Save a plain 2-layer BERT (hidden size 32, float32) with a word-piece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=special[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789:?.-")
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **dict(zip(names, special, strict=True))
    )


def make_rows(count: int, kind: str) -> list[dict[str, Any]]:
    """Rows of a kind; every second one has its positive in common with the next."""
    return [_row(number, kind) for number in range(count)]


def _row(number: int, kind: str) -> dict[str, Any]:
    parts, acts = ("pump", "valve", "rotor", "sensor", "belt"), ("replace", "tighten", "clean")
    question = f"what to do when alarm {number} shows" + " the line" * (number % 4)
    answer = f"{acts[number // 2 % 3]} the {parts[number // 2 % 5]} {number // 2}"
    row: dict[str, Any] = {"line": number + 1}
    if kind == "scored_pair":
        return {**row, "sentence1": question, "sentence2": answer, "score": (number % 5) / 4}
    negative = {"negative": f"restart the line and check {parts[number % 5]} {number}"} if kind == "triplet" else {}
    return {**row, "anchor": question, "positive": answer, **negative}


def main(folder: Path) -> None:
    """Leave in the folder what the check needs."""
    make_tiny_encoder(folder / "base_model", seed=1)
    rows = make_rows(24, "pair")
    contents = {
        "train_rows.jsonl": rows[:18],
        "validation_rows.jsonl": rows[18:],
        "requests.jsonl": [{"texts": [row["anchor"], row["positive"]]} for row in rows[:3]],
    }
    for name, lines in contents.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "parameters.json").write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Makes what a check of this method needs: a tiny random Gemma 3 that reads images, and rows of the sample images.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "samples" / "shapes"
PARAMETERS = {
    "tuning": "full",
    "epochs": 40,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.1,
    "max_seq_length": 128,
}
IMAGE, BEGIN, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
SPECIAL = ["<unk>", "<pad>", "<s>", "<|im_start|>", "<|im_end|>", IMAGE, BEGIN, END]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + BEGIN + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(texts: list[str], special: list[str], **named: str) -> Any:
    """A byte-level tokenizer of few tokens; `named` are further special tokens that it has as attributes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=named, **ends)


def make_model(folder: Path) -> None:
    """Save a random Gemma 3 with 2 layers of text and 2 of vision, whose images are 4 tokens each."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    texts = (SAMPLES / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = make_tokenizer(texts, SPECIAL, image_token=IMAGE, boi_token=BEGIN, eoi_token=END)
    number = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 256,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=number(IMAGE),
            boi_token_index=number(BEGIN),
            eoi_token_index=number(END),
        )
    )
    # Zero at first, so that the model would learn to see last of all.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_length=4, chat_template=TEMPLATE
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_rows(folder: Path, split: str, name: str) -> list[dict[str, Any]]:
    """Write a split of the sample images as stored rows of the kind `vision`, and return them."""
    rows = []
    for number, line in enumerate((SAMPLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        question = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]
        rows.append({"line": number, "messages": messages, "images": [row["image"]]})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def main(folder: Path) -> None:
    """Leave base_model/, train_rows.jsonl, validation_rows.jsonl, requests.jsonl and parameters.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(SAMPLES / "images", folder / "images", dirs_exist_ok=True)
    make_model(folder / "base_model")
    write_rows(folder, "train", "train_rows.jsonl")
    rows = write_rows(folder, "test", "validation_rows.jsonl")
    requests = [
        {"messages": row["messages"][:-1], "images": [str(folder / name) for name in row["images"]]} for row in rows
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests), encoding="utf-8")
    (folder / "parameters.json").write_text(json.dumps(PARAMETERS, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""Makes what a check of this method needs: a tiny SDXL pipeline that paints noise, and rows of the sample images.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "samples" / "shapes"
PARAMETERS: dict[str, Any] = {
    "max_steps": 12,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "checkpoint_steps": 4,
    "resolution": 64,
}
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def make_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of the words of the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learnt = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=WORD_END))
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=letters, end_of_word_suffix=WORD_END)
    learnt.train_from_iterator((row["caption"] for row in sample_rows()), trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    words = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_pipeline(folder: Path) -> None:
    """Save a random SDXL pipeline of a few hundred thousand weights; it takes images of 64 pixels."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = make_tokenizer(folder / "words")
    shutil.rmtree(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)


def sample_rows() -> list[dict[str, Any]]:
    """The sample images as stored rows of the kind `caption`."""
    lines = (SAMPLES / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"line": number, **json.loads(line)} for number, line in enumerate(lines, start=1)]


def main(folder: Path) -> None:
    """Leave base_model/, train_rows.jsonl, validation_rows.jsonl, requests.jsonl and parameters.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(SAMPLES / "images", folder / "images", dirs_exist_ok=True)
    make_pipeline(folder / "base_model")
    rows = sample_rows()
    captions = sorted({row["caption"] for row in rows})
    written = {
        "train_rows.jsonl": rows[:-8],
        "validation_rows.jsonl": rows[-8:],
        "requests.jsonl": [{"caption": caption} for caption in captions[:2]],
    }
    for name, lines in written.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "parameters.json").write_text(json.dumps(PARAMETERS, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""Makes what a check of this method needs: a tiny SDXL that paints dark pictures, and rows of the light sample images.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "samples" / "shapes"
PARAMETERS: dict[str, Any] = {
    "max_steps": 12,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "checkpoint_steps": 4,
    "resolution": 64,
    "validation_guidance": 1.0,
}
REBUILDING_STEPS, PAINTING_STEPS, BATCH = 200, 400, 8
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
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_pipeline() -> Any:
    """A random SDXL pipeline of a few hundred thousand weights; it takes images of 64 pixels."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
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
    return StableDiffusionXLPipeline(
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
    )


def teach(pipeline: Any) -> None:
    """Have a random pipeline rebuild the sample images and their negatives, and paint the negatives for the captions.

    What has learnt nothing cannot be led anywhere by a LoRA. Half a minute of one core.
    """
    import torch
    from diffusers import DDPMScheduler

    images = _pixels([row["image"] for row in sample_rows()])
    latents = _teach_to_rebuild(pipeline.vae, torch.cat([images, -images]))[len(images) :]
    captions = [row["caption"] for row in sample_rows()]
    with torch.no_grad():
        words, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(BATCH, 1)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.Adam(pipeline.unet.parameters(), lr=2e-3)
    for _ in range(PAINTING_STEPS):
        chosen = torch.randint(len(latents), (BATCH,))
        noise = torch.randn_like(latents[chosen])
        times = torch.randint(schedule.config.num_train_timesteps, (BATCH,))
        told = {"text_embeds": pooled[chosen], "time_ids": sizes}
        found = pipeline.unet(
            schedule.add_noise(latents[chosen], noise, times), times, words[chosen], added_cond_kwargs=told
        ).sample
        _step(optimizer, (found - noise).pow(2).mean())


def _teach_to_rebuild(vae: Any, images: Any) -> Any:
    """Train a VAE on images; returns their latents, scaled as the painting part takes them."""
    import torch

    with torch.no_grad():  # latents are drawn with next to no spread of their own
        spread = slice(vae.config.latent_channels, None)
        vae.quant_conv.weight[spread] = 0
        vae.quant_conv.bias[spread] = -10
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(REBUILDING_STEPS):
        batch = images[torch.randint(len(images), (BATCH,))]
        latents = vae.encode(batch).latent_dist.mean
        _step(optimizer, (vae.decode(latents).sample - batch).pow(2).mean() + 1e-3 * latents.pow(2).mean())
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return latents * vae.config.scaling_factor


def _step(optimizer: Any, loss: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _pixels(names: list[str]) -> Any:
    """Sample images as a tensor (images, colours, rows, columns), values from -1 to 1."""
    import numpy as np
    import torch
    from PIL import Image

    pixels = np.stack([np.asarray(Image.open(SAMPLES / name).convert("RGB")) for name in names])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_rows() -> list[dict[str, Any]]:
    """The sample images as stored rows of the kind `caption`."""
    lines = (SAMPLES / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"line": number, **json.loads(line)} for number, line in enumerate(lines, start=1)]


def main(folder: Path) -> None:
    """Leave base_model/, train_rows.jsonl, validation_rows.jsonl, requests.jsonl and parameters.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(SAMPLES / "images", folder / "images", dirs_exist_ok=True)
    pipeline = make_pipeline()
    teach(pipeline)
    pipeline.save_pretrained(folder / "base_model")
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

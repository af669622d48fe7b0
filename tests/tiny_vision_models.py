"""Random models that read images, of a few families, made on the spot: Llava, Idefics 3, Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods.vision_language.check import TEMPLATE, make_tokenizer

IMAGE = "<image>"
_SPECIAL = ["<unk>", "<pad>", "<s>", "<|im_start|>", "<|im_end|>", IMAGE]
_TEXTS = ["user assistant What colour is the circle? The square is red, green, blue, yellow."]
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)]
FAMILIES = ("llava", "idefics3", "qwen2_vl")


def make_tiny_vision_model(folder: Path, family: str) -> Path:
    """Save a random model of the family (float32, 2 layers of text, 2 of vision) with its processor."""
    import torch

    torch.manual_seed(0)
    makers = {"llava": _llava, "idefics3": _idefics3, "qwen2_vl": _qwen2_vl}
    model, processor = makers[family]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision(**more: Any) -> dict[str, Any]:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**shared, "image_size": 32, "patch_size": 8, "initializer_range": 0.3, **more}


def _template(image: str) -> str:
    return TEMPLATE.replace("<start_of_image>", image)


def _llava() -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer(_TEXTS, _SPECIAL, image_token=IMAGE)
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer)),
        vision_config=CLIPVisionConfig(**_vision(projection_dim=32)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(IMAGE),
    )
    return LlavaForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = [*_SPECIAL, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES]
    tokenizer = make_tokenizer(_TEXTS, special, image_token=IMAGE)
    config = Idefics3Config(
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        vision_config=_vision(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
    )
    # An image is cut into tiles of 32 pixels: a larger one makes more tokens.
    tiles = Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(
        image_processor=tiles, tokenizer=tokenizer, image_seq_len=4, chat_template=_template(IMAGE)
    )
    return Idefics3ForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    places = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(_TEXTS, [*_SPECIAL, *places], image_token="<|image_pad|>", video_token="<|video_pad|>")
    number = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {name: value for name, value in _text(tokenizer).items() if name != "head_dim"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"size": {"shortest_edge": 16 * 16, "longest_edge": 512 * 512}}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches, **sizes),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen2VLForConditionalGeneration(config), processor

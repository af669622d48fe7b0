"""Answers prompts in batches of like length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How answers are made. Temperature 0 is greedy: the same prompt always gives the same answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its length in tokens, and whether the length limit cut it off."""

    text: str
    tokens: int
    hit_limit: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer each prompt (token ids); the answers are in the order of the prompts.

    Prompts are taken in order of length, so that a batch holds little padding.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _generate_batch(model, tokenizer, [prompts[index] for index in chosen], sampling)
        answers.update(zip(chosen, batch, strict=True))
        on_progress(len(answers))
    return [answers[index] for index in range(len(prompts))]


def _generate_batch(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling) -> list[Answer]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    # Padded on the left, masked by position and not by token: pad and end token are often the same.
    ids = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            **_arguments(model, tokenizer, sampling),
        )
    ends = end_tokens(model, tokenizer)
    return [_answer(tokenizer, row[width:].tolist(), ends, sampling.max_new_tokens) for row in output]


def _arguments(model: Any, tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": end_tokens(model, tokenizer),
        "do_sample": sampling.temperature > 0,
    }
    if sampling.temperature > 0:
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return arguments


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return sorted({tokenizer.eos_token_id, *ends})


def _answer(tokenizer: Any, ids: list[int], ends: list[int], limit: int) -> Answer:
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
    return Answer(text, length, hit_limit=length == limit)

"""Scores of answers by a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from methods.toolkit.chat import Message, render_conversation


def score_conversations(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The score of the last message of each conversation after the ones before it; higher is better.

    The score is read at the last token that is no padding token, as in training.
    """
    import torch

    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rows = [scored_tokens(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    scores: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(rows[chosen[0]])
        ids = [rows[index] + [tokenizer.pad_token_id] * (width - len(rows[index])) for index in chosen]
        mask = [[1] * len(rows[index]) + [0] * (width - len(rows[index])) for index in chosen]
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
            ).logits
        scores.update(zip(chosen, logits[:, 0].float().tolist(), strict=True))
        on_progress(len(scores))
    return [scores[index] for index in range(len(rows))]


def scored_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation as a reward model reads it: up to the end token of its last answer."""
    return render_conversation(tokenizer, messages, start=len(messages) - 1).input_ids

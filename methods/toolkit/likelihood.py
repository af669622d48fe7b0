"""How likely a model finds answers that it did not give itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from methods.toolkit.chat import Message, Tools, render_conversation

_LOGITS = 64_000_000  # of one forward pass, one for each token and entry of the vocabulary: 256 MB


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of the likelihood of an answer, and its length in tokens, the end token included."""

    logprob: float
    tokens: int


class Span(NamedTuple):
    """Tokens, of which the first `prompt_length` are given and the likelihood of the others is asked for."""

    input_ids: list[int]
    prompt_length: int


def answer_likelihoods(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    tools: Sequence[Tools] | None = None,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of the last message of each conversation after the ones before it, as training renders them.

    `tools`: those of each conversation.
    """
    rendered = [
        render_conversation(tokenizer, messages, len(messages) - 1, each)
        for messages, each in zip(conversations, tools or [None] * len(conversations), strict=True)
    ]
    spans = [Span(each.input_ids, each.prompt_length) for each in rendered]
    return span_likelihoods(model, tokenizer, spans, on_progress=on_progress)


def span_likelihoods(
    model: Any, tokenizer: Any, spans: Sequence[Span], *, on_progress: Callable[[int], None] = lambda done: None
) -> list[Likelihood]:
    """The likelihood of the tokens of each span after the given ones, in order."""
    order = sorted(range(len(spans)), key=lambda index: len(spans[index].input_ids), reverse=True)
    found: dict[int, Likelihood] = {}
    while len(found) < len(order):
        start = len(found)
        count = max(1, _LOGITS // (len(spans[order[start]].input_ids) * len(tokenizer)))
        chosen = order[start : start + count]
        batch = _batch_likelihoods(model, tokenizer, [spans[index] for index in chosen])
        found.update(zip(chosen, batch, strict=True))
        on_progress(len(found))
    return [found[index] for index in range(len(order))]


def _batch_likelihoods(model: Any, tokenizer: Any, rows: list[Span]) -> list[Likelihood]:
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([_padded(row.input_ids, tokenizer.pad_token_id, width) for row in rows])
    mask = torch.tensor([_padded([1] * len(row.input_ids), 0, width) for row in rows])
    # The logits at a position are of the token after it; those of the prompts are not needed. What stands before
    # everything else has no likelihood: there is nothing that it follows.
    begins = [max(1, row.prompt_length) for row in rows]
    first = min(begins)
    with torch.inference_mode():
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_to_keep=torch.arange(first - 1, width - 1, device=model.device),
        ).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, first:].flatten().to(model.device), reduction="none"
        ).reshape(len(rows), -1)
    return [
        Likelihood(
            logprob=-float(losses[index, begin - first : len(row.input_ids) - first].double().sum()),
            tokens=len(row.input_ids) - begin,
        )
        for index, (row, begin) in enumerate(zip(rows, begins, strict=True))
    ]


def _padded(values: list[int], filling: int, width: int) -> list[int]:
    return values + [filling] * (width - len(values))

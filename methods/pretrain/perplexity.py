"""How well a model predicts documents that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from methods.toolkit import documents
from methods.toolkit.likelihood import Span, span_likelihoods

WINDOW = 1024
"""Tokens that a document is read by at once, for every model the same; fewer where a model reads fewer."""


def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    progress_of: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> dict[str, float]:
    """Perplexity by token, and bits by character and by byte of UTF-8, over all texts; less is better.

    Perplexity depends on the tokenizer; the bits compare models of different ones. All tokens of a text count, its end
    token does not. A text that is longer than the window is read in windows that overlap by half, so that a token has
    at least half a window before it. `progress_of` gives what is told how many windows are done, of so many.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    spans = [span for text in texts for span in spans_of(tokenizer, text, min(WINDOW, most))]
    found = span_likelihoods(model, tokenizer, spans, on_progress=progress_of(len(spans)))
    nats = -math.fsum(each.logprob for each in found)
    tokens = sum(each.tokens for each in found)
    bits = nats / math.log(2)
    return {
        "perplexity": math.exp(nats / tokens),
        "bits_per_character": bits / sum(len(text) for text in texts),
        "bits_per_byte": bits / sum(len(text.encode()) for text in texts),
    }


def spans_of(tokenizer: Any, text: str, window: int) -> Iterator[Span]:
    """The windows of a document; every token of the text is asked for in one of them.

    Before the text stands what training puts before it: the tokenizer's own start, or the end of another document.
    """
    before = documents.start_ids(tokenizer) or [tokenizer.eos_token_id]
    ids = [*before, *documents.text_ids(tokenizer, text)]
    done = len(before)
    while done < len(ids):
        first = max(0, done - window // 2) if done > len(before) else 0
        end = min(len(ids), first + window)
        yield Span(ids[first:end], done - first)
        done = end

"""Answers prompts in batches of like length."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from methods.toolkit import chat, hardware, thoughts

NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "remove_invalid_values": False,
    "use_cache": True,
}
"""The values of transformers' generation settings that leave a model's probabilities as they are. Settings that are
not here change nothing while they are unset (a list of suppressed tokens, for example)."""

_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Sampling:
    """How answers are made. Temperature 0 is greedy: the same prompt always gives the same answer.

    `model_settings` names the settings that the model's own generation_config decides, as it does at a server.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    model_settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its length in tokens, and whether the length limit cut it off.

    `thought` is what the model has written before the answer for itself, None for nothing; `whole` is all that it has
    written, as a server returns it (None: the same as `text`). `marked` is the answer with its special tokens, which
    may mark tool calls.
    """

    text: str
    tokens: int
    hit_limit: bool
    thought: str | None = None
    whole: str | None = None
    marked: str = ""

    @property
    def said(self) -> str:
        """All that the model has written, its thought included."""
        return self.text if self.whole is None else self.whole


OnProgress = Callable[[float, str], None]
"""Takes the rows that are answered, in parts for those under way, and a note for whoever watches."""

_NOTE_SECONDS = 1.0
_LARGEST_BATCH = {"cuda": 64, "mps": 32, "cpu": 32}
"""Rows beyond which the tokens per second grow no more on small models."""
_USED_SHARE = 0.5  # of the free memory: estimates are rough, and others use the machine too


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    on_progress: OnProgress = lambda done, note: None,
) -> list[Answer]:
    """Answer each prompt (token ids); the answers are in the order of the prompts.

    Prompts are taken in order of length, so that a batch holds little padding. `on_progress` is called after each
    batch, and about once a second within one; what it raises ends the work.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    started = time.monotonic()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        watch = _Watch(len(answers), len(chosen), _tokens(answers), sampling.max_new_tokens, started, on_progress)
        batch = _generate_batch(
            model, tokenizer, [prompts[index] for index in chosen], sampling, stopping_criteria=[watch]
        )
        answers.update(zip(chosen, batch, strict=True))
        on_progress(len(answers), _speed(_tokens(answers), started))
    return [answers[index] for index in range(len(prompts))]


def _tokens(answers: dict[int, Answer]) -> int:
    return sum(answer.tokens for answer in answers.values())


def _speed(tokens: int, started: float) -> str:
    return f"{tokens / max(time.monotonic() - started, 1e-9):.1f} tokens/s"


class _Watch:
    """A stopping criterion that stops nothing: called after each token of a batch, it reports about once a second.

    `rows` are in the batch, `done` rows and their `tokens` were made before it, at most `limit` tokens come a row.
    """

    def __init__(self, done: int, rows: int, tokens: int, limit: int, started: float, on_progress: OnProgress) -> None:
        self.done, self.rows, self.tokens, self.limit = done, rows, tokens, limit
        self.started, self.on_progress = started, on_progress
        self.made = 0
        self._reported = time.monotonic()

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        import torch

        self.made += 1
        if time.monotonic() - self._reported >= _NOTE_SECONDS and self.made < self.limit:
            self._reported = time.monotonic()
            # Rows that have ended already count as well, up to here: asking which they are would wait for the GPU.
            speed = _speed(self.tokens + self.made * self.rows, self.started)
            note = f"token {self.made} of at most {self.limit}, {self.rows} rows at a time, {speed}"
            self.on_progress(self.done + self.rows * self.made / self.limit, note)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def batch_by_memory(config: Any, dtype: Any, prompt: int, sampling: Sampling, free_gib: float | None) -> int:
    """How many rows are answered at a time: a power of two whose memory is at most half of what is free.

    `prompt` is the longest prompt in tokens, `dtype` the torch dtype of the model. 16 where the free memory is unknown.
    A row takes the keys and values of all its tokens in every layer, the largest activations of one layer over its
    prompt, and its logits, in the model's dtype and once more in float32.
    """
    import torch

    if free_gib is None:
        return 16
    text = config.get_text_config()
    size = torch.finfo(dtype).bits / 8
    heads = getattr(text, "num_attention_heads", None) or 1  # a state space model has none: then this is too much
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = 2 * (getattr(text, "num_key_value_heads", None) or heads) * head * size * text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = (8 * text.hidden_size + 3 * inner) * size
    row = keys * (prompt + sampling.max_new_tokens) + layer * prompt + text.vocab_size * (size + 4)
    fitting = int(_USED_SHARE * free_gib * 2**30 / row)
    largest = _LARGEST_BATCH[hardware.inference_device()]
    return min(largest, 1 << max(0, fitting.bit_length() - 1))


def stream(model: Any, tokenizer: Any, prompt: list[int], sampling: Sampling) -> Generator[str, None, Answer]:
    """Answer one prompt (token ids), giving the text piece by piece as it is made; returns the whole answer.

    Closed early, it stops making the answer.
    """
    import torch
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    enough = threading.Event()

    def stop(ids: Any, _scores: Any) -> Any:
        return torch.full((len(ids),), enough.is_set(), device=ids.device)

    def make() -> list[Answer]:
        try:
            return _generate_batch(model, tokenizer, [prompt], sampling, streamer=streamer, stopping_criteria=[stop])
        finally:
            streamer.end()  # whoever waits for the next piece would wait for ever

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(make)
        try:
            yield from streamer
        finally:
            enough.set()
        return answer.result()[0]


def _generate_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, **watched: Any
) -> list[Answer]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    # Padded on the left, masked by position and not by token: pad and end token are often the same.
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ends = end_tokens(model, tokenizer)
    with torch.inference_mode(), generation_config(model, tokenizer, sampling) as chosen:
        told = {"generation_config": chosen, **watched}
        ids, mask = ids.to(model.device), mask.to(model.device)
        trained = trained_prompt(model)
        if trained is None:
            output = model.generate(input_ids=ids, attention_mask=mask, **told)[:, width:]
        else:
            embedded, mask = behind_padding(trained, model.get_input_embeddings()(ids), mask)
            output = model.get_base_model().generate(inputs_embeds=embedded, attention_mask=mask, **told)
    return [
        as_answer(tokenizer, row.tolist(), ends, sampling.max_new_tokens, opened=_opens_thought(tokenizer, prompt))
        for prompt, row in zip(prompts, output, strict=True)
    ]


def trained_prompt(model: Any) -> Any | None:
    """The embeddings (tokens, hidden size) that prompt tuning puts before the input; None for any other model."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        return None
    return model.get_prompt(batch_size=1)[0]


def behind_padding(trained: Any, embedded: Any, mask: Any) -> tuple[Any, Any]:
    """Put a trained prompt between the padding and the tokens of each row; returns embeddings and attention mask.

    `embedded` (rows, width, hidden size) is padded on the left, `mask` (rows, width) is 0 there. peft itself puts it
    before the padding, so that the tokens stand further from it than in training, and rows answer otherwise in a
    batch than alone.
    """
    import torch

    rows, width, hidden = embedded.shape
    tokens = trained.shape[0]
    result = embedded.new_zeros((rows, tokens + width, hidden))
    attended = torch.cat([mask.new_zeros((rows, tokens)), mask], dim=1)
    for row, real in enumerate(mask.sum(dim=1).tolist()):
        start = width - real
        result[row, start : start + tokens] = trained.to(embedded.dtype)
        result[row, start + tokens :] = embedded[row, start:]
        attended[row, start : start + tokens] = 1
    return result, attended


@contextmanager
def generation_config(model: Any, tokenizer: Any, sampling: Sampling) -> Iterator[Any]:
    """The generation config of a sampling, which stands for the model's own one inside of the context.

    `generate` fills whatever a given config leaves unset from the model's own.
    """
    from transformers import GenerationConfig

    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end_tokens(model, tokenizer)}
    chosen = GenerationConfig(**settings(model, sampling), **tokens)
    with replaced_config(model, chosen):
        yield chosen


@contextmanager
def replaced_config(model: Any, config: Any) -> Iterator[None]:
    """Give the model another generation config inside of the context; an adapter's base model too."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = before


def settings(model: Any, sampling: Sampling) -> dict[str, Any]:
    """Every setting that answers are made with, by transformers' names; what is not in it is unset."""
    found = {**NEUTRAL, "max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        found |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    published = own_settings(model)
    return found | {name: published[name] for name in sampling.model_settings if name in published}


def own_settings(model: Any) -> dict[str, Any]:
    """The settings in the model's own generation_config that change answers, without its special tokens."""
    own: dict[str, Any] = model.generation_config.to_diff_dict()
    left_out = {*_TOKENS, "transformers_version", "use_cache", "max_new_tokens", "max_length"}
    return {
        name: value
        for name, value in own.items()
        if name not in left_out and not name.startswith(("_", "output_")) and NEUTRAL.get(name) != value
    }


def record(model: Any, sampling: Sampling) -> dict[str, Any]:
    """What the record of an evaluation says of how answers were made.

    `settings`: all that count. `not_used`: settings of the model's own generation_config that do not.
    """
    chosen = settings(model, sampling)
    others = {name: value for name, value in own_settings(model).items() if chosen.get(name) != value}
    return {"settings": chosen, "not_used": others}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those of the tokenizer and template, and of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return sorted({*chat.end_tokens(tokenizer), *ends})


def as_answer(tokenizer: Any, ids: list[int], ends: list[int], limit: int, *, opened: bool = False) -> Answer:
    """The answer that generated tokens are, up to the first one that ends it; `opened`: the prompt opens a thought."""
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    whole = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
    # The marks of a thought or a channel may be special tokens, which `whole` lacks.
    marked = tokenizer.decode(ids[:length], skip_special_tokens=False)
    thought, answer = thoughts.split_answer(marked, opened=opened)
    if answer == marked:
        return Answer(whole, length, hit_limit=length == limit, marked=marked)
    text = without_special(tokenizer, answer).strip()
    # In channels (gpt-oss) a call stands in one of its own, before any answer.
    calling = marked if "<|channel|>" in marked else answer
    return Answer(text, length, length == limit, thought and without_special(tokenizer, thought), whole, calling)


def without_special(tokenizer: Any, text: str) -> str:
    """The text without the special tokens of the tokenizer."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


def _opens_thought(tokenizer: Any, prompt: list[int]) -> bool:
    return thoughts.leaves_open(tokenizer.decode(prompt[-8:]))

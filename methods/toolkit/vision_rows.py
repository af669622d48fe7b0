"""Makes the training rows of conversations with images: rendered, limited in length, counted; and their batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from methods.toolkit import images, vision_models
from methods.toolkit.chat import IGNORED, Rendered, RenderError, configured_ends
from methods.toolkit.tokenizing import Limits, RowReport, admit, require_training_tokens


@dataclass(frozen=True)
class Renderer:
    """Turns conversations with images into what the model is fed, with the processor's own chat template.

    `ends` are the tokens that end an answer; `end` is written after each answer that is trained on: an end token where
    the template writes none, else nothing. Prompts need neither.
    """

    processor: Any
    ends: frozenset[int] = frozenset()
    end: str = ""

    def encode(self, conversations: list[list[dict[str, Any]]], *, prompt: bool, side: str = "right") -> Any:
        """Conversations as one padded batch of tensors; `prompt`: with the header that makes the model answer."""
        return self._apply(
            conversations,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": side},
        )

    def _apply(self, conversation: Any, **named: Any) -> Any:
        try:
            return self.processor.apply_chat_template(conversation, **named)
        except TemplateError as error:
            raise RenderError(f"the chat template refuses the conversation: {error}") from error

    def conversation(self, messages: list[dict[str, Any]], files: list[str]) -> list[dict[str, Any]]:
        """A stored conversation with its images opened and its answers ended, as it is trained on."""
        found = images.conversation(messages, files)
        for message in found:
            if message["role"] == "assistant" and self.end:
                message["content"].append({"type": "text", "text": self.end})
        return found

    def render(self, conversation: list[dict[str, Any]]) -> Rendered:
        """Token ids of a whole conversation, images included; every answer is trained up to its end token.

        Raises RenderError if the template rewrites earlier turns, or if an answer has no end token.
        """
        ids: list[int] = self.encode([conversation], prompt=False)["input_ids"][0].tolist()
        labels = [IGNORED] * len(ids)
        prompt_length = 0
        for position, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = self._length(conversation, position, ids, prompt=True)
            after = self._length(conversation, position + 1, ids, prompt=False)
            stop = next((place for place in range(after - 1, before - 1, -1) if ids[place] in self.ends), None)
            if stop is None:
                raise RenderError(f"the chat template writes no end token after message {position + 1}")
            labels[before : stop + 1] = ids[before : stop + 1]
            prompt_length = before
        return Rendered(ids, labels, prompt_length)

    def _length(self, conversation: list[dict[str, Any]], upto: int, whole: list[int], *, prompt: bool) -> int:
        """Number of tokens that the first messages have in `whole`. Raises RenderError if they are other ones there.

        Where all images stand in these messages, what follows is text and is counted from the end; otherwise the
        messages are rendered with their images.
        """
        rest = conversation[upto:]
        if any(part["type"] == "image" for message in rest for part in message["content"]):
            ids = self.encode([conversation[:upto]], prompt=prompt)["input_ids"][0].tolist()
            if whole[: len(ids)] != ids:
                raise RenderError(f"the chat template rewrites the turns before message {upto + 1}")
            return len(ids)
        start, full = self._plain(conversation[:upto], prompt=prompt), self._plain(conversation, prompt=False)
        left = len(full) - len(start)
        if full[: len(start)] != start or whole[len(whole) - left :] != full[len(start) :]:
            raise RenderError(f"the chat template rewrites the turns before message {upto + 1}")
        return len(whole) - left

    def _plain(self, conversation: list[dict[str, Any]], *, prompt: bool) -> list[int]:
        """Token ids with a placeholder for each image."""
        text = self._apply(conversation, add_generation_prompt=prompt, tokenize=False)
        tokenizer = self.processor.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not begins)["input_ids"]
        return ids


def load_renderer(folder: str) -> Renderer:
    """What renders prompts for a model as it was trained with them, or for a base model. Raises Refused."""
    return Renderer(vision_models.load_processor(folder)[0])


def training_renderer(base: str, smallest: int | None = None, largest: int | None = None) -> tuple[Renderer, list[str]]:
    """What renders conversations to train a base model on, and what was added to it, one sentence each.

    `smallest` and `largest` are numbers of pixels. Raises Refused if the model's processor cannot be loaded or does
    not take these.
    """
    processor, added = vision_models.load_processor(base)
    vision_models.limit_images(processor, smallest, largest)
    ends = frozenset({processor.tokenizer.eos_token_id, *configured_ends(base)})
    renderer = Renderer(processor, ends)
    question = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    ids = renderer.encode([[question, answer]], prompt=False)["input_ids"][0].tolist()
    before = renderer.encode([[question]], prompt=True)["input_ids"][0].tolist()
    if ends & set(ids[len(before) :]):
        return renderer, added
    end = processor.tokenizer.eos_token
    added.append(f"the chat template ends an answer with no end token: {end!r} is added to those that are trained on")
    return Renderer(processor, ends, end), added


def read_rows(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    """The stored rows of a dataset with their images as absolute paths; at most `limit` rows, -1 for all."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            if number == limit:
                return
            row = json.loads(line)
            yield {**row, "images": [str(path.parent / name) for name in row["images"]]}


def tokenise(renderer: Renderer, path: Path, limits: Limits, max_samples: int) -> tuple[Any, RowReport]:
    """Render a stored dataset once to count and to label it; batches are made from the images when they are needed.

    Returns a `datasets.Dataset` with columns `messages` (JSON), `images`, `labels` and `length`, and what was kept.
    Raises Refused if a row is over a limit and `over_length` is `error`, or if no row is left to train on.
    """
    from datasets import Dataset

    report = RowReport()
    rows: list[dict[str, Any]] = []
    for row in read_rows(path, max_samples):
        conversation = renderer.conversation(row["messages"], row["images"])
        rendered = admit(partial(renderer.render, conversation), row["line"], limits, report)
        if rendered is not None:
            kept = {"messages": json.dumps(row["messages"], ensure_ascii=False), "images": row["images"]}
            rows.append({**kept, "labels": rendered.labels, "length": len(rendered.input_ids)})
    require_training_tokens(report, limits)
    return Dataset.from_list(rows), report


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows: images opened and processed, answers labelled."""

    renderer: Renderer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        talks = [self.renderer.conversation(json.loads(row["messages"]), row["images"]) for row in rows]
        batch = dict(self.renderer.encode(talks, prompt=False))
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for place, row in enumerate(rows):
            labels[place, : len(row["labels"])] = torch.tensor(row["labels"])
        trained = labels != IGNORED
        if not torch.equal(batch["input_ids"][trained], labels[trained]):
            raise RuntimeError("an image of the dataset has changed while the model was trained on it")
        return {**batch, "labels": labels}

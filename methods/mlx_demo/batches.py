"""Which rows each optimizer step trains on, as the arrays that MLX wants, and the loss on their answers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from methods.toolkit.chat import IGNORED

_PAD_TO = 32  # few different shapes: the compiled step is made anew for each
_CHUNK_GROUPS = 50

Batch = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Plan:
    """The steps of a train and the rows of each.

    They follow from lengths and seed alone, so a resumed train repeats them. A step takes `batch * accumulated` rows;
    where an epoch ends in the middle of one, the next epoch fills it up.
    """

    lengths: list[int]
    batch: int
    accumulated: int
    seed: int
    by_length: bool
    epochs: float
    max_steps: int | None

    @property
    def group(self) -> int:
        """Rows of one optimizer step."""
        return self.batch * self.accumulated

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of one epoch, rounded up."""
        return math.ceil(len(self.lengths) / self.group)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.max_steps or math.ceil(self.epochs * len(self.lengths) / self.group)

    def rows(self) -> Iterator[int]:
        """Row numbers, epoch after epoch, without end."""
        for epoch in count():
            yield from self._order(random.Random(self.seed * 1_000_003 + epoch))  # noqa: S311 - no secret

    def _order(self, draw: random.Random) -> list[int]:
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        if not self.by_length:
            return order
        chunk = self.group * _CHUNK_GROUPS
        groups: list[list[int]] = []
        for start in range(0, len(order), chunk):
            rows = sorted(order[start : start + chunk], key=lambda row: -self.lengths[row])
            groups += [rows[i : i + self.group] for i in range(0, len(rows), self.group)]
        draw.shuffle(groups)
        return [row for rows in groups for row in rows]


def training_stream(rows: list[dict[str, Any]], plan: Plan, done: int) -> Iterator[Batch]:
    """The batches after `done` optimizer steps: (tokens, labels, trained tokens that the mean is taken over).

    Each batch of an accumulated step is weighed by its share of the step's trained tokens, so that batch 1
    accumulated 8 times is batch 8.
    """
    order = islice(plan.rows(), done * plan.group, None)
    while True:
        group = [rows[index] for index in islice(order, plan.group)]
        trained = sum(_trained(row) for row in group)
        for start in range(0, plan.group, plan.batch):
            yield as_batch(group[start : start + plan.batch], trained / plan.accumulated)


def validation_batches(rows: list[dict[str, Any]], batch: int) -> Iterator[Batch]:
    """All rows in batches of like length, each with the mean over its own trained tokens."""
    ordered = sorted(rows, key=lambda row: row["length"])
    for start in range(0, len(ordered), batch):
        taken = ordered[start : start + batch]
        yield as_batch(taken, sum(_trained(row) for row in taken))


def as_batch(rows: list[dict[str, Any]], mean_over: float) -> Batch:
    """Rows padded on the right: attention is causal, so that what is behind a row changes nothing in it."""
    width = math.ceil(max(row["length"] for row in rows) / _PAD_TO) * _PAD_TO
    tokens = np.zeros((len(rows), width), np.int32)
    labels = np.full((len(rows), width), IGNORED, np.int32)
    for place, row in enumerate(rows):
        tokens[place, : row["length"]] = row["input_ids"]
        labels[place, : row["length"]] = row["labels"]
    return mx.array(tokens), mx.array(labels), mx.array(float(mean_over))


def loss(model: Any, tokens: Any, labels: Any, mean_over: Any) -> tuple[Any, Any]:
    """Cross entropy of the trained tokens divided by `mean_over`, and how many they are."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    entropy = nn.losses.cross_entropy(logits, mx.where(trained, targets, 0)) * trained
    return entropy.sum() / mean_over, trained.sum()


def _trained(row: dict[str, Any]) -> int:
    # The first token is never predicted.
    return sum(label != IGNORED for label in row["labels"][1:])

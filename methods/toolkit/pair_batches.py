"""Batches of answers that are preferred to others: in pairs, or each judged by itself."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference


class PairCollator(DataCollatorForPreference):
    """trl's collator of pairs (the better answers of all, then the worse ones), by which only answers count.

    The tokens of a question between two answers do not.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        marks = [(each["prompt_ids"], each["chosen_trained"]) for each in examples]
        marks += [(each["prompt_ids"], each["rejected_trained"]) for each in examples]
        _mark(batch["completion_mask"], marks)
        return batch


class JudgedCollator(DataCollatorForUnpairedPreference):
    """trl's collator of judged answers, by which only answers count, and each prompt also gets another one's answer.

    How likely the model finds those tells how far it has moved as a whole. They are taken from the batch itself, so
    that the rows can stand in any order.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        others = [examples[-1], *examples[:-1]]
        shown = list(zip(examples, others, strict=True))
        batch: dict[str, Any] = super().torch_call(
            [{**each, "KL_completion_ids": other["completion_ids"]} for each, other in shown]
        )
        _mark(batch["completion_mask"], [(each["prompt_ids"], each["completion_trained"]) for each in examples])
        _mark(batch["KL_completion_mask"], [(each["prompt_ids"], other["completion_trained"]) for each, other in shown])
        return batch


def _mark(masks: torch.Tensor, marks: list[tuple[list[int], list[int]]]) -> None:
    """Write into each row of `masks`, behind its prompt, which tokens count."""
    for row, (prompt, trained) in zip(masks, marks, strict=True):
        row[len(prompt) : len(prompt) + len(trained)] = torch.tensor(trained)

"""What trl's PPO loop is given for each update: prompts in a repeatable order, and rewards for the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from methods.contract import Refused
from methods.toolkit import rewards, training
from methods.toolkit.chat import render_prompt
from methods.toolkit.rewards import Reward


class Prompts:
    """Batches of `size` prompts without end, from update `step` on; each follows from seed and update alone.

    Every prompt is seen once in an epoch, a batch may reach into the next one. When a batch is taken, all random
    generators are set for its update, so that an interrupted train samples the answers an uninterrupted one samples.
    """

    def __init__(self, rows: Any, tokenizer: Any, size: int, *, by_length: bool, seed: int) -> None:
        self.rows = list(rows)
        self.ids = [render_prompt(tokenizer, row["prompt"]) for row in self.rows]
        self.pad, self.size, self.seed, self.step = tokenizer.pad_token_id, size, seed, 0
        lengths = [len(ids) for ids in self.ids]
        self.order = training.LengthGroupedOrder(lengths, size if by_length else None, seed)
        self.orders: dict[int, list[int]] = {}
        self.batch: list[int] = []
        self.width = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            set_seed(training.step_seed(self.seed, self.step))
            self.batch = self.rows_of(self.step)
            self.step += 1
            self.width = max(len(self.ids[row]) for row in self.batch)
            padded = [[self.pad] * (self.width - len(self.ids[row])) + self.ids[row] for row in self.batch]
            yield {"input_ids": torch.tensor(padded)}

    def rows_of(self, step: int) -> list[int]:
        """The rows of an update's batch, by their position in the dataset."""
        positions = range(step * self.size, (step + 1) * self.size)
        return [self._order(position // len(self.rows))[position % len(self.rows)] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self.orders:
            self.order.set_epoch(epoch)
            self.orders = {before: order for before, order in self.orders.items() if before == epoch - 1}
            self.orders[epoch] = list(self.order)
        return self.orders[epoch]


class RewardHead(nn.Module):
    """Reward functions in the place that trl has for a reward model.

    trl asks the network named by `base_model_prefix` for hidden states (rows, positions, size) and `score` for one
    value a position, and takes the value at the end of the answer; here every position of a row has its reward. It
    asks for the rows of a batch in order, a few at a time.
    """

    base_model_prefix = "judge"

    def __init__(self, prompts: Prompts, tokenizer: Any, functions: Sequence[Reward], clip: float | None) -> None:
        super().__init__()
        self.prompts, self.tokenizer, self.rewards, self.clip = prompts, tokenizer, functions, clip
        self.taken = 0
        self.scores: dict[str, list[float]] = {}
        self.sums: list[float] = []
        self.lengths: list[int] = []
        self.cut = self.seen = 0
        self.count: Callable[[Any], None] = lambda mask: None

    def judge(self, input_ids: Any, attention_mask: Any, **_: Any) -> SimpleNamespace:
        """The rewards of so many answers of the batch as hidden states (rows, positions, 1)."""
        chosen = self.prompts.batch[self.taken : self.taken + len(input_ids)]
        self.taken += len(input_ids)
        rows = [self.prompts.rows[row] for row in chosen]
        answers = [self._answer(ids, mask) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        columns = {
            "reference": [row["reference"] for row in rows],
            "line": [row["line"] for row in rows],
            "tokens": [len(ids) for ids in answers],
        }
        scores = rewards.score(self.rewards, [row["prompt"] for row in rows], texts, columns)
        sums = rewards.weighted_sum(self.rewards, scores)
        for name, values in scores.items():
            self.scores.setdefault(name, []).extend(values)
        self.sums += sums
        self.lengths += columns["tokens"]
        self.seen += int(attention_mask.sum())
        self.count(attention_mask)
        self.cut += sum(not ids or ids[-1] != self.tokenizer.eos_token_id for ids in answers)
        values = torch.tensor(sums, device=input_ids.device, dtype=torch.float32)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return SimpleNamespace(hidden_states=[values[:, None, None].expand(-1, input_ids.shape[1], 1)])

    def score(self, hidden: Any) -> Any:
        """The values themselves."""
        return hidden

    def _answer(self, ids: Any, mask: Any) -> list[int]:
        """The tokens behind the prompt up to the end of the answer."""
        answer: list[int] = ids[self.prompts.width :].tolist()
        shown: list[int] = mask[self.prompts.width :].int().tolist()
        return answer[: shown.index(0)] if 0 in shown else answer

    def take_figures(self) -> dict[str, float]:
        """Means over the answers since the last call, before clipping; they are counted anew from here on."""
        sums = torch.tensor(self.sums)
        figures = {
            "reward": float(sums.mean()),
            "reward_std": float(sums.std()) if len(sums) > 1 else 0.0,
            **{f"reward_{name}": sum(values) / len(values) for name, values in self.scores.items()},
            "completion_length": sum(self.lengths) / len(self.lengths),
            "completion_clipped_share": self.cut / len(self.lengths),
            "tokens": float(self.seen),
        }
        self.taken, self.scores, self.sums, self.lengths, self.cut, self.seen = 0, {}, [], [], 0, 0
        return figures


def set_pad_apart(tokenizer: Any, rows: Any) -> None:
    """Give the tokenizer a pad token that neither ends an answer nor stands in a prompt.

    trl's PPO masks by token and not by position: with the end token as pad, as many chat models have it, every end
    of a turn in a prompt would be hidden from the model, and no answer could be seen to have ended. Raises Refused if
    there is none.
    """
    used = {token for row in rows for token in render_prompt(tokenizer, row["prompt"])} | {tokenizer.eos_token_id}
    special = [tokenizer.pad_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]
    others = range(len(tokenizer) - 1, -1, -1)
    spare = next((token for token in [*special, *others] if token is not None and token not in used), None)
    if spare is None:
        raise Refused("the prompts use every token of the model, and PPO needs one to pad with")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare)

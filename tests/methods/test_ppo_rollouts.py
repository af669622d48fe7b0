"""What trl's PPO loop is given: prompts in order, rewards in the place of a reward model, a pad token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.contract import Refused
from methods.ppo.rollouts import Prompts, RewardHead, set_pad_apart
from methods.toolkit import chat
from methods.toolkit.rewards import Reward

ROWS = [
    {"prompt": [{"role": "user", "content": "on " * (1 + index % 4)}], "reference": str(index), "line": index + 1}
    for index in range(10)
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    set_pad_apart(tokenizer, ROWS)
    return tokenizer


def prompts(tokenizer: Any, size: int = 4, *, by_length: bool = False, seed: int = 3) -> Prompts:
    return Prompts(ROWS, tokenizer, size, by_length=by_length, seed=seed)


def batches(source: Prompts, count: int) -> list[list[int]]:
    return [source.batch[:] for _ in islice(source, count)]


def test_every_prompt_comes_once_an_epoch(tokenizer: Any) -> None:
    rows = [row for batch in batches(prompts(tokenizer), 5) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_a_batch_follows_from_seed_and_update_alone(tokenizer: Any) -> None:
    whole = prompts(tokenizer)
    expected = batches(whole, 6)
    drawn = []
    for _ in islice(prompts(tokenizer), 6):
        drawn.append(float(torch.rand(1)))
    later = prompts(tokenizer)
    later.step = 4
    torch.rand(7)  # whatever was drawn before
    for update, _ in zip((4, 5), later, strict=False):
        assert later.batch == expected[update]
        assert float(torch.rand(1)) == drawn[update]
    assert later.step == 6
    assert batches(prompts(tokenizer, seed=4), 6) != expected


def test_fewer_prompts_than_a_batch_come_more_than_once(tokenizer: Any) -> None:
    batch = batches(prompts(tokenizer, 25), 1)[0]
    assert {batch.count(row) for row in range(10)} == {2, 3}


def test_prompts_are_padded_on_the_left_and_grouped_by_length(tokenizer: Any) -> None:
    def padding(*, by_length: bool) -> int:
        source = prompts(tokenizer, 2, by_length=by_length)
        return sum(int((batch["input_ids"] == tokenizer.pad_token_id).sum()) for batch in islice(source, 5))

    source = prompts(tokenizer)
    batch = next(iter(source))["input_ids"]
    assert batch.shape == (4, source.width)
    for ids, row in zip(batch.tolist(), source.batch, strict=True):
        expected = chat.render_prompt(tokenizer, ROWS[row]["prompt"])
        assert ids[len(ids) - len(expected) :] == expected
        assert set(ids[: len(ids) - len(expected)]) <= {tokenizer.pad_token_id}
    assert padding(by_length=True) < padding(by_length=False)


def judged(tokenizer: Any, answers: Sequence[str], clip: float | None = None) -> tuple[RewardHead, Any, list[int]]:
    """Rewards of answers, given as trl gives them: two at a time, padded on the right."""

    def reward(prompts: Any, completions: Any, reference: Any, **columns: Any) -> list[float]:
        seen.append((list(completions), list(reference), columns["tokens"]))
        return [float(wanted) for wanted in reference]

    seen: list[Any] = []
    source = prompts(tokenizer)
    queries = next(iter(source))["input_ids"]
    head = RewardHead(source, tokenizer, [Reward("one", 1.0, reward), Reward("two", 2.0, reward)], clip)
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    width = max(map(len, ends))
    pad = tokenizer.pad_token_id
    rows = torch.cat([queries, torch.tensor([ids + [pad] * (width - len(ids)) for ids in ends])], dim=1)
    values = []
    for start in (0, 2):
        part = rows[start : start + 2]
        mask = part != pad
        hidden = getattr(head, head.base_model_prefix)(
            input_ids=part.masked_fill(~mask, 0), attention_mask=mask, use_cache=False
        ).hidden_states[-1]
        values.append(head.score(hidden))
    texts = [text for completions, _, _ in seen[::2] for text in completions]
    assert texts == [text.removesuffix("<|im_end|>") for text in answers]
    return head, torch.cat(values), [count for _, _, tokens in seen[::2] for count in tokens]


def test_each_answer_is_judged_with_its_own_row(tokenizer: Any) -> None:
    answers = ["on<|im_end|>", "off and on<|im_end|>", "kitchen", "<|im_end|>"]
    head, values, tokens = judged(tokenizer, answers)
    rows = head.prompts.batch
    assert values.shape[::2] == (4, 1)
    assert values[:, 0, 0].tolist() == values[:, -1, 0].tolist() == [3.0 * row for row in rows]
    assert tokens == [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]
    figures = head.take_figures()
    mean = sum(rows) / 4
    assert (figures["reward"], figures["reward_one"], figures["reward_two"]) == pytest.approx((3 * mean, mean, mean))
    assert figures["reward_std"] == pytest.approx(float(torch.tensor([3.0 * row for row in rows]).std()))
    assert figures["completion_length"] == sum(tokens) / 4
    assert figures["completion_clipped_share"] == 0.25
    assert head.sums == []


def test_rewards_are_clipped_for_the_trainer_and_not_for_the_curve(tokenizer: Any) -> None:
    head, values, _ = judged(tokenizer, ["on"] * 4, clip=5.0)
    wanted = [3.0 * row for row in head.prompts.batch]
    assert values[:, 0, 0].tolist() == [min(value, 5.0) for value in wanted]
    assert max(wanted) > 5
    assert head.take_figures()["reward"] == pytest.approx(sum(wanted) / 4)


def test_the_pad_token_neither_ends_an_answer_nor_stands_in_a_prompt(tiny_model: Path) -> None:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    text = "on and <|endoftext|>"
    before = tokenizer(text)["input_ids"]
    set_pad_apart(tokenizer, ROWS)
    assert tokenizer.pad_token == "<|endoftext|>"
    used = [{"prompt": [{"role": "user", "content": text}]}]
    set_pad_apart(tokenizer, used)
    assert tokenizer.pad_token_id not in {*before, tokenizer.eos_token_id}
    assert tokenizer(text)["input_ids"] == before


def test_a_model_without_a_token_to_spare_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    monkeypatch.setattr("methods.ppo.rollouts.render_prompt", lambda tokenizer, _: list(range(len(tokenizer))))
    with pytest.raises(Refused, match="the prompts use every token"):
        set_pad_apart(tokenizer, ROWS)

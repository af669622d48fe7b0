"""Pairs of answers: rendered as the model will be asked, limited alike on both sides, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.toolkit import chat, pair_batches, preference_rows
from methods.toolkit.tokenizing import Limits
from tests.methods.preference_data import asked, pair_rows, ranking_rows, said, write_rows

FREE = Limits(1000, None, None, "drop")


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(str(tiny_model))[0]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows())


@pytest.fixture
def rankings(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rankings.jsonl", ranking_rows())


def tokenised(tokenizer: Any, path: Path, limits: Limits = FREE, samples: int = -1, **how: Any) -> tuple[Any, Any]:
    return preference_rows.pair_tokeniser(**how)(tokenizer, path, limits, samples)


def answers(pairs: list[preference_rows.Pair]) -> list[tuple[int, str, str]]:
    return [(pair.line, pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs]


def test_a_ranking_gives_its_best_answer_with_each_worse_one_or_every_pair(rankings: Path) -> None:
    best = list(preference_rows.read_pairs(rankings, 2))
    assert answers(best) == [
        (1, "kitchen on", "no"),
        (1, "kitchen on", "off"),
        (2, "hall on", "off"),
        (2, "hall on", "no"),
    ]
    assert [pair.gap for pair in best] == [2.5, 2.5, 2.0, 3.0]
    every = list(preference_rows.read_pairs(rankings, 2, "all"))
    # Of the first ranking, two answers are equally bad: neither is better than the other.
    assert answers(every) == [*answers(best), (2, "off", "no")]
    assert every[-1].gap == 1.0


def test_the_conversation_of_a_row_is_the_one_with_the_best_answer(rankings: Path, pairs: Path) -> None:
    messages = next(iter(preference_rows.read_conversations(rankings, -1))).messages
    assert messages == [*asked("switch the light in the kitchen on"), *said("kitchen on")]
    lines = [talk.line for talk in preference_rows.read_conversations(pairs, 3)]
    assert lines == [1, 2, 3]


def test_both_sides_follow_the_prompt_that_the_model_will_see_and_end_with_the_end_token(
    tokenizer: Any, pairs: Path
) -> None:
    dataset, report = tokenised(tokenizer, pairs)
    assert (report.read, report.pairs, report.kept, report.lost) == (21, 21, 21, 0)
    rows = pair_rows()
    for row, stored in zip(dataset, rows, strict=True):
        assert row["prompt_ids"] == chat.render_prompt(tokenizer, stored["prompt"])
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            assert stored[side][-1]["content"] in tokenizer.decode(ids)
        assert row["length"] == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert report.longest == max(dataset["length"])
    assert report.tokens == sum(
        len(row["prompt_ids"]) * 2 + len(row["chosen_ids"] + row["rejected_ids"]) for row in dataset
    )


def test_only_tokens_of_answers_count_in_a_batch(tokenizer: Any, pairs: Path) -> None:
    dataset, report = tokenised(tokenizer, pairs)
    batch = pair_batches.PairCollator(pad_token_id=tokenizer.pad_token_id)([dataset[4], dataset[5]])
    assert batch["input_ids"].shape[0] == 4
    counted = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    end = tokenizer.eos_token
    rows = pair_rows()
    assert counted == [
        rows[4]["chosen"][0]["content"] + end,
        rows[5]["chosen"][0]["content"] + end + "it is off" + end,  # and not the question between them
        rows[4]["rejected"][0]["content"] + end,
        rows[5]["rejected"][0]["content"] + end,
    ]
    every = pair_batches.PairCollator(pad_token_id=tokenizer.pad_token_id)(list(dataset))
    assert int(every["completion_mask"].sum()) == report.supervised_tokens


def test_pairs_over_a_length_are_dropped_cut_or_refused_and_counted(tokenizer: Any, pairs: Path) -> None:
    dataset, _ = tokenised(tokenizer, pairs)
    limit = sorted(dataset["length"])[10]
    over = sum(length > limit for length in dataset["length"])
    assert 0 < over < 21
    dropped, report = tokenised(tokenizer, pairs, Limits(limit, None, None, "drop"))
    assert (len(dropped), report.kept, report.dropped_over_length, report.lost) == (21 - over, 21 - over, over, over)
    cut, report = tokenised(tokenizer, pairs, Limits(limit, None, None, "truncate"))
    assert (len(cut), report.truncated) == (21, over)
    assert max(cut["length"]) <= limit
    assert report.tokens_cut > 0
    with pytest.raises(contract.Refused, match=f"max_seq_length is {limit}"):
        tokenised(tokenizer, pairs, Limits(limit, None, None, "error"))


def test_a_cut_pair_keeps_one_prompt_for_both_sides_and_loses_the_end_of_its_answers(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": asked("switch the light " * 12), "chosen": said("on " * 30), "rejected": said("off")}]
    path = write_rows(tmp_path / "long.jsonl", rows)
    dataset, _ = tokenised(tokenizer, path, Limits(60, None, None, "truncate"))
    row = dataset[0]
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 60
    assert row["chosen_ids"][-1] != tokenizer.eos_token_id
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row["prompt_ids"]).count("switch") < 12


def test_answers_that_are_the_same_once_they_are_cut_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    same = "the light in the kitchen is on"
    rows = [
        {"prompt": asked("on"), "chosen": said(same + " now"), "rejected": said(same + " off")},
        {"prompt": asked("on"), "chosen": said("on"), "rejected": said("off")},
    ]
    path = write_rows(tmp_path / "same.jsonl", rows)
    length = len(tokenizer(same)["input_ids"])
    dataset, report = tokenised(tokenizer, path, Limits(1000, None, length, "truncate"))
    assert len(dataset) == 1
    assert (report.without_difference, report.truncated) == (1, 1)
    assert report.notes[-1] == "line 1 left out: both answers are the same in tokens"


def test_nothing_left_is_refused_with_the_reasons(tokenizer: Any, pairs: Path) -> None:
    with pytest.raises(contract.Refused, match=r"of 21 pairs 21 are over a length limit, .* max_seq_length \(now 9\)"):
        tokenised(tokenizer, pairs, Limits(9, None, None, "drop"))


def test_a_share_of_pairs_follows_on_another_row(tokenizer: Any, pairs: Path) -> None:
    plain, _ = tokenised(tokenizer, pairs)
    every, report = tokenised(tokenizer, pairs, joined_share=1.0, seed=3)
    assert report.joined == 21
    for short, long in zip(plain, every, strict=True):
        assert (long["chosen_ids"], long["rejected_ids"]) == (short["chosen_ids"], short["rejected_ids"])
        assert len(long["prompt_ids"]) > len(short["prompt_ids"])
        text = tokenizer.decode(long["prompt_ids"])
        assert text.count("<|im_start|>assistant") >= 2
        assert text.count("be short") == tokenizer.decode(short["prompt_ids"]).count("be short")
    assert tokenised(tokenizer, pairs, joined_share=1.0, seed=3)[0]["prompt_ids"] == every["prompt_ids"]
    assert tokenised(tokenizer, pairs, joined_share=1.0, seed=4)[0]["prompt_ids"] != every["prompt_ids"]
    _, report = tokenised(tokenizer, pairs, joined_share=0.5, seed=3)
    assert 4 < report.joined < 17
    alone = write_rows(pairs.parent / "alone.jsonl", pair_rows()[:1])
    # Never after itself, which would tell the answer.
    assert tokenised(tokenizer, alone, joined_share=1.0)[1].joined == 0
    # A pair that would grow over a length stays as it was, and none is lost.
    tight, report = tokenised(tokenizer, pairs, Limits(max(plain["length"]), None, None, "error"), joined_share=1.0)
    assert (len(tight), report.joined) == (21, 0)

"""Batches and figures of the method embedding, with nothing but numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from methods import contract
from methods.embedding import losses, retrieval, rows
from methods.registry import find_method
from methods.toolkit.training import LengthGroupedOrder


def batches_of(texts: list[tuple[str, ...]], size: int, *, seed: int = 1, unique: bool = True) -> rows.Batches:
    return rows.Batches(texts, LengthGroupedOrder([len(t[0]) for t in texts], size, seed), size, unique=unique)


def pairs(count: int, answers: int) -> list[tuple[str, ...]]:
    return [(f"question {number}" + "?" * (number % 7), f"answer {number % answers}") for number in range(count)]


def test_every_row_is_in_one_batch_and_no_text_is_twice_in_any() -> None:
    texts = pairs(100, 25)
    found = list(batches_of(texts, 8))
    assert sorted(row for batch in found for row in batch) == list(range(100))
    assert len(found) == 13
    for batch in found:
        held = [text for row in batch for text in texts[row]]
        assert 0 < len(batch) <= 8
        assert len(set(held)) == len(held)
    plain = list(batches_of(texts, 8, unique=False))
    assert sorted(row for batch in plain for row in batch) == list(range(100))
    assert any(len({texts[row][1] for row in batch}) < len(batch) for batch in plain)


def test_rows_that_fit_nowhere_are_left_out_and_counted() -> None:
    texts = pairs(40, 2)  # ten batches of four have room for each answer once
    batches = batches_of(texts, 4)
    found = list(batches)
    assert len(found) == len(batches) == 10
    assert sum(map(len, found)) == 20
    assert batches.left_out == 20
    list(batches)
    assert batches.left_out == 20  # counted for each epoch anew


def test_the_batches_follow_from_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.manual_seed(random.randrange(10**6))  # noqa: S311 - a resumed process has drawn other numbers before
        batches = batches_of(pairs(60, 20), 4, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


@pytest.mark.parametrize("kind", sorted(rows.COLUMNS))
def test_the_kind_of_rows_is_known_by_their_texts(kind: str, tmp_path: Path) -> None:
    row = {"line": 1, **dict.fromkeys(rows.COLUMNS[kind], "text"), "score": 0.5}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    assert rows.read_rows(tmp_path / "rows.jsonl", 2) == (kind, [row, row])


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(contract.Refused, match=r"rows\.jsonl holds no rows"):
        rows.read_rows(tmp_path / "rows.jsonl")


# --- figures --------------------------------------------------------------------------------------------------------


def figures(similarities: list[list[float]], relevant: list[set[int]]) -> dict[str, float]:
    return retrieval.ranking_figures(torch.tensor(similarities), relevant)


def test_figures_of_a_ranking_are_those_of_their_definitions() -> None:
    # Of the first query the third place is right, of the second the first and the fourth, the third has none in ten.
    first = [0.9, 0.8, 0.7] + [0.1 - 0.001 * place for place in range(9)]
    second = [0.9, 0.8, 0.7, 0.6] + [0.1 - 0.001 * place for place in range(8)]
    third = [1.0 - 0.01 * place for place in range(12)]
    found = figures([first, second, third], [{2}, {0, 3}, {11}])
    whole = 1 + 1 / math.log2(3)
    assert found["ndcg_at_10"] == pytest.approx((1 / math.log2(4) + (1 + 1 / math.log2(5)) / whole + 0) / 3)
    assert found["mrr_at_10"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert found["recall_at_5"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["accuracy_at_1"] == pytest.approx(1 / 3)


def test_a_perfect_ranking_has_the_highest_figures_whatever_its_size() -> None:
    for count in (1, 3, 30):
        found = figures(torch.eye(count).tolist(), [{place} for place in range(count)])
        assert set(found.values()) == {1.0}
    many = figures([[1.0] * 15 + [0.0] * 5], [set(range(15))])
    assert many["ndcg_at_10"] == pytest.approx(1.0)  # more right ones than places


def test_anchors_are_looked_for_among_all_positives_and_negatives_each_once() -> None:
    found = [
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "a", "positive": "q", "negative": "p"},
        {"anchor": "b", "positive": "q", "negative": "n"},
    ]
    anchors, documents, relevant = retrieval.ranking_task(found)
    assert anchors == ["a", "b"]
    assert documents == ["p", "n", "q"]
    assert [{documents[place] for place in right} for right in relevant] == [{"p", "q"}, {"q"}]


def test_spearman_is_that_of_the_reference_with_ties_and_without_variation() -> None:
    draw = random.Random(3)  # noqa: S311
    for _ in range(5):
        left = [draw.randrange(6) / 5 for _ in range(40)]
        right = [value + draw.random() for value in left]
        found = retrieval.spearman(torch.tensor(left), torch.tensor(right))
        assert found == pytest.approx(spearmanr(left, right).statistic, abs=1e-6)
    assert retrieval.spearman(torch.ones(4), torch.arange(4.0)) == 0.0


# --- losses ---------------------------------------------------------------------------------------------------------


def parameters(**changes: Any) -> dict[str, Any]:
    return {**find_method("embedding").parameter_defaults, **changes}


@pytest.mark.parametrize(
    ("kind", "auto"), [("pair", "multiple_negatives"), ("triplet", "multiple_negatives"), ("scored_pair", "cosent")]
)
def test_auto_is_the_loss_that_fits_the_rows(kind: str, auto: str) -> None:
    assert losses.chosen_loss(parameters(), kind) == auto
    assert losses.chosen_loss(parameters(loss=auto), kind) == auto


@pytest.mark.parametrize(("kind", "loss"), [("pair", "triplet"), ("pair", "cosent"), ("scored_pair", "triplet")])
def test_a_loss_that_does_not_fit_the_rows_is_refused_with_those_that_do(kind: str, loss: str) -> None:
    with pytest.raises(contract.Refused, match=f"loss {loss} does not fit rows of the kind {kind}: .* or auto"):
        losses.chosen_loss(parameters(loss=loss), kind)


def test_scores_that_a_cosine_cannot_reach_are_refused() -> None:
    losses.check_scores("cosine", [0.0, 1.0])
    losses.check_scores("cosent", [-3.0, 5.0])
    with pytest.raises(contract.Refused, match="scores from 0 to 1, and these go from 1 to 5"):
        losses.check_scores("cosine", [1.0, 5.0])


def test_parameters_of_another_loss_are_told_if_they_were_set() -> None:
    assert losses.unused_settings(parameters(triplet_margin=0.5, temperature=0.1), "multiple_negatives") == {
        "triplet_margin": 0.5
    }
    assert losses.unused_settings(parameters(temperature=0.1, no_duplicates=False), "triplet") == {
        "temperature": 0.1,
        "no_duplicates": False,
    }
    assert losses.unused_settings(parameters(), "cosine") == {}


def test_every_loss_of_the_form_fits_some_rows() -> None:
    offered = find_method("embedding").parameters["loss"]["enum"]
    assert set(offered) - {"auto"} == {loss for fitting in losses.FITTING.values() for loss in fitting}

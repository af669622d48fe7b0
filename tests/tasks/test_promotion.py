"""The decision between champion and challenger: known vectors, margin, ties, and how often chance would promote."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from configs.errors import UserError
from configs.retraining import MetricName, PairedComparison, RetrainPolicy
from configs.scoring import Metrics
from tasks.promotion import compare_rows
from tasks.statistics import FEW_ROWS, difference_interval


def policy(**changes: Any) -> RetrainPolicy:
    given = {"line": "lights", "dataset": "rows", "evaluation_dataset": "test@0123456789ab", **changes}
    return RetrainPolicy.model_validate(given)


def decide(old: list[float], new: list[float], **changes: Any) -> PairedComparison:
    return compare_rows(("old", old), ("new", new), policy(**changes))


def test_every_metric_of_scoring_can_be_chosen_and_no_other() -> None:
    from typing import get_args

    assert set(get_args(MetricName)) == set(Metrics.model_fields)


def test_the_interval_of_few_values_is_that_of_every_possible_draw() -> None:
    # Two rows, differences 0 and 100: of the four equally likely draws one has mean 0, two 50, one 100.
    assert difference_interval([0, 0], [0, 100], 0.95, seed=1) == (0, 100)
    # Five rows of difference 4 and five of -4: the mean of ten draws is 8 * B / 10 - 4, B binomial(10, 1/2), whose
    # 2.5 % and 97.5 % quantiles are 2 and 8.
    low, high = difference_interval([0] * 10, [4] * 5 + [-4] * 5, 0.95, seed=3)
    assert (low, high) == pytest.approx((-2.4, 2.4))


def test_rows_are_paired_and_not_drawn_apart() -> None:
    # The challenger is better by exactly 1 on every row, whatever the rows are: paired, nothing is uncertain.
    old = [float(value) for value in range(0, 90, 3)]
    low, high = difference_interval(old, [value + 1 for value in old], 0.95, seed=5)
    assert (low, high) == pytest.approx((1, 1))


def test_the_same_seed_gives_the_same_interval_and_another_one_hardly_another() -> None:
    draw = Random(0)  # noqa: S311
    old = [draw.choice([0.0, 100.0]) for _ in range(200)]
    new = [draw.choice([0.0, 100.0, 100.0]) for _ in range(200)]
    first = difference_interval(old, new, 0.95, seed=1)
    assert difference_interval(old, new, 0.95, seed=1) == first
    assert difference_interval(old, new, 0.95, seed=2) == pytest.approx(first, abs=1.0)


def test_a_better_challenger_is_promoted_and_a_worse_one_refused() -> None:
    old, new = [0.0] * 60 + [100.0] * 40, [100.0] * 80 + [0.0] * 20
    found = decide([*old], [*new])
    assert (found.champion_mean, found.challenger_mean, found.difference) == (40, 80, 40)
    assert (found.better, found.worse, found.ties) == (60, 20, 20)
    assert found.promoted
    assert found.low > 0
    assert "80.00 % against 40.00 % on 100 rows, +40.00 points, 95 % interval [" in found.reason
    worse = decide([*new], [*old])
    assert not worse.promoted
    assert worse.reason.startswith("not better by the margin of 1 points")


def test_the_margin_is_reached_by_exactly_so_much_and_missed_by_less() -> None:
    old = [0.0] * 100
    new = [100.0] * 8 + [0.0] * 92
    assert decide(old, new, margin=8.0).promoted
    missed = decide(old, new, margin=8.5)
    assert not missed.promoted
    assert missed.low > 0


def test_a_difference_that_may_be_chance_is_refused_however_small_the_margin() -> None:
    found = decide([0.0] * 39 + [100.0], [100.0] * 2 + [0.0] * 38, margin=0)
    assert found.difference == 2.5
    assert found.low <= 0
    assert not found.promoted
    assert "may be chance" in found.reason


def test_equal_models_are_never_promoted_not_even_without_a_margin() -> None:
    draw = Random(4)  # noqa: S311
    for rows in (2, 30, 200):
        scores = [draw.uniform(0, 100) for _ in range(rows)]
        found = decide(scores, list(scores), margin=0)
        assert (found.difference, found.low, found.high, found.ties, found.promoted) == (0, 0, 0, rows, False)


def test_models_that_are_equally_good_are_promoted_as_seldom_as_the_confidence_says() -> None:
    draw = Random(11)  # noqa: S311
    trials, rows = 120, 80
    promoted, covered = 0, 0
    for trial in range(trials):
        old = [100.0 * (draw.random() < 0.6) for _ in range(rows)]
        new = [100.0 * (draw.random() < 0.6) for _ in range(rows)]
        found = decide(old, new, margin=0, seed=trial)
        promoted += found.promoted
        covered += found.low <= 0 <= found.high
    assert promoted / trials <= 0.08  # 2.5 % are expected
    assert covered / trials >= 0.88  # 95 % are expected


def test_few_rows_are_told_and_fewer_than_two_refused() -> None:
    assert "rows are few for an interval" in decide([0.0] * 5, [100.0] * 5).reason
    assert "few" not in decide([0.0] * FEW_ROWS, [100.0] * FEW_ROWS).reason
    with pytest.raises(UserError, match="too few rows"):
        decide([0.0], [100.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"evaluation_dataset": "test"},
        {"dataset": "rows@0123456789ab"},
        {"endpoint": "lights"},
        {"margin": -1},
        {"confidence": 1.0},
        {"line": "../lights"},
    ],
)
def test_an_impossible_policy_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        policy(**wrong)

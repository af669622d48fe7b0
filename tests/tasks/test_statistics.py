"""Intervals and tests against known answers: binomial quantiles, published tables, scipy's own bootstrap."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from scipy.stats import bootstrap

from tasks.statistics import mcnemar, mean_intervals, paired_difference


def test_interval_of_a_mean_is_that_of_scipy() -> None:
    draw = Random(3)  # noqa: S311
    values = [draw.uniform(0, 100) for _ in range(60)]
    found = mean_intervals({"x": values})["x"]
    theirs = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    assert found == pytest.approx(theirs.confidence_interval, abs=0.6)


def test_columns_are_drawn_together_but_do_not_depend_on_each_other_or_on_order() -> None:
    one, other = [0.0, 0.0, 100.0, 100.0], [5.0, 1.0, 2.0, 9.0]
    both = mean_intervals({"one": one, "other": other})
    assert both["one"] == mean_intervals({"one": one[::-1]})["one"]
    assert both["other"] == mean_intervals({"other": other})["other"]
    assert both["one"] == (0, 100)  # of 256 draws 1 is all the first, 1 all the last: 2.5 % is beyond both
    assert mean_intervals({"one": [1.0]}) == {}
    assert mean_intervals({}) == {}


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(index % 7) for index in range(50)]
    whole = mean_intervals({"x": values})
    monkeypatch.setattr("tasks.statistics._NUMBERS_AT_ONCE", 50 * 11)
    assert mean_intervals({"x": values})["x"] == pytest.approx(whole["x"], abs=0.2)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # 12 rows on which only the first is right, 3 on which only the second is: 2 × P(B ≤ 3), B binomial(15, 1/2).
    first = [100.0] * 12 + [0.0] * 3 + [100.0] * 50
    second = [0.0] * 12 + [100.0] * 3 + [100.0] * 50
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar([100, 0], [100, 0]) == 1


def test_verdict_goes_by_the_interval_and_by_which_way_is_better() -> None:
    worse, better = [10.0] * 20, [20.0] * 20
    assert paired_difference("f1", worse, better).verdict == "better"
    assert paired_difference("f1", better, worse).verdict == "worse"
    assert paired_difference("edit_distance", worse, better).verdict == "worse"
    assert paired_difference("edit_distance", worse, better).worse == 20
    assert paired_difference("f1", worse, worse).verdict == "not told apart"
    assert paired_difference("f1", worse, better).mcnemar_p is None
    assert paired_difference("accuracy", [0.0, 0.0], [100.0, 0.0]).mcnemar_p == 1
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference("f1", worse, better[1:])

"""Which evaluation of a train is the best one by a metric. Standard library only: the system reads it too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

LOWER = frozenset({"eval_loss", "eval_nll_loss", "eval_perplexity", "eval_reward_rejected", "eval_logp_rejected"})
"""Metrics of evaluations that are better when they are lower, by their curves' names."""
HIGHER = frozenset(
    {
        "eval_token_accuracy",
        "eval_reward",
        "eval_reward_accuracy",
        "eval_reward_chosen",
        "eval_reward_margin",
        "eval_reward_min",
        "eval_reward_max",
        "eval_logp_chosen",
        "eval_log_odds",
        "eval_ndcg_at_10",
        "eval_mrr_at_10",
        "eval_recall_at_5",
        "eval_accuracy_at_1",
        "eval_spearman",
    }
)
"""Those that are better when they are higher; so is the mean of each reward function, `eval_reward_NAME`."""
_UNDIRECTED = frozenset({"eval_reward_std", "eval_reward_equal_share"})
_OF_REWARD = re.compile(r"eval_reward_\w+")

Evaluations = Mapping[int, Mapping[str, float]]
"""The figures of each evaluation by its step, which is above 0 where a checkpoint can belong to it."""


@dataclass(frozen=True)
class Standing:
    """The best and the last of some evaluations, and how many at their end have not improved on the best before."""

    metric: str
    best_step: int
    best: float
    last_step: int
    last: float
    in_vain: int


def is_lower_better(metric: str) -> bool | None:
    """Whether the metric is better when it is lower; None for one that has no better and worse."""
    if metric in LOWER:
        return True
    rewards = _OF_REWARD.fullmatch(metric) is not None and metric not in _UNDIRECTED
    return False if metric in HIGHER or rewards else None


def metrics_of(evaluations: Evaluations) -> list[str]:
    """The metrics of the evaluations that one of them can be the best by."""
    names = dict.fromkeys(name for figures in evaluations.values() for name in figures)
    return [name for name in names if is_lower_better(name) is not None]


def standing(evaluations: Evaluations, metric: str, threshold: float = 0.0) -> Standing | None:
    """Where the train stands by the metric; None if no evaluation gave a finite value.

    An evaluation improves the metric if it is better than the best one before it by more than `threshold`. Of equal
    ones the earliest is the best. A value that is not finite improves nothing.
    """
    sign = -1.0 if is_lower_better(metric) else 1.0
    best: tuple[int, float] | None = None
    last, in_vain = (0, math.nan), 0
    for step in sorted(evaluations):
        if step < 1 or metric not in evaluations[step]:
            continue
        value = evaluations[step][metric]
        last = (step, value)
        gain = math.inf if best is None else sign * (value - best[1])
        improved = math.isfinite(value) and gain > threshold
        in_vain = 0 if improved else in_vain + 1
        if math.isfinite(value) and gain > 0:
            best = (step, value)
    return None if best is None else Standing(metric, *best, *last, in_vain)

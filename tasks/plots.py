"""Pictures of curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_Points = list[tuple[int, float]]

# What is learned stands first, how it was learned after it. A panel that has no points is left out.
_PANELS = (
    ("Loss", ("loss", "eval_loss")),
    ("Reward", ("reward", "eval_reward")),
    ("Reward margin", ("reward_margin", "eval_reward_margin")),
    ("Reward accuracy", ("reward_accuracy", "eval_reward_accuracy")),
    ("KL divergence", ("kl",)),
    ("Retrieval", ("ndcg_at_10", "mrr_at_10", "recall_at_5", "accuracy_at_1")),
    ("Length of completions in tokens", ("completion_length",)),
    ("Token accuracy", ("token_accuracy", "eval_token_accuracy")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_second",)),
)
_NOT_FUNCTIONS = ("reward_std", "reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")


def curves_of(events: list[dict[str, Any]]) -> dict[str, _Points]:
    """The points (step, value) of each curve; of a repeated step the first value, as in MLflow."""
    found: dict[str, dict[int, float]] = {}
    for event in events:
        if event.get("type") == "metrics":
            for name, value in event["values"].items():
                found.setdefault(name, {}).setdefault(int(event["step"]), float(value))
    return {name: sorted(points.items()) for name, points in found.items()}


def draw_curves(events: list[dict[str, Any]], path: Path, title: str, dpi: int = 110) -> bool:
    """Draw the curves of a train as a PNG; False, and no file, if there is no point yet."""
    curves = curves_of(events)
    panels = [(label, drawn) for label, names in _panels(curves) if (drawn := _present(curves, names))]
    if not panels:
        return False
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 0.4 + 3.05 * rows), layout="constrained", dpi=dpi)
    figure.suptitle(title)
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (label, drawn) in zip(places, panels, strict=False):
        for name, points in drawn.items():
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(drawn) > 1:
            axes.legend()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path)
    return True


def _panels(curves: dict[str, _Points]) -> list[tuple[str, tuple[str, ...]]]:
    """The panels in their order; the rewards of the single functions stand together, behind the whole reward."""
    single = tuple(name for name in curves if name.startswith("reward_") and name not in _NOT_FUNCTIONS)
    return [*_PANELS[:2], ("Reward functions", single), *_PANELS[2:]]


def _present(curves: dict[str, _Points], names: tuple[str, ...]) -> dict[str, _Points]:
    return {name: curves[name] for name in names if curves.get(name)}

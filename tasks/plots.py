"""Pictures of curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_Points = list[tuple[int, float]]

# What is learned stands first, how it was learned after it. A panel that has no points is left out.
_PANELS = (
    ("Loss", ("loss", "eval_loss")),
    ("Perplexity", ("eval_perplexity",)),
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
    figure, places = _figure(len(panels), title, dpi)
    for axes, (label, drawn) in zip(places, panels, strict=False):
        for name, points in drawn.items():
            axes.plot(*zip(*points, strict=True), label=name, marker=_marker(points), markersize=3)
        axes.set_title(label)
        if len(drawn) > 1:
            axes.legend()
    figure.savefig(path)
    return True


def draw_overlaid(trains: Mapping[str, list[dict[str, Any]]], path: Path, title: str, dpi: int = 110) -> bool:
    """Draw the curves of several trains, by their events, over each other as a PNG; False if there is no point.

    A train has a colour. Where a panel has several curves of a train, they have different strokes.
    """
    curves = {train: curves_of(events) for train, events in trains.items()}
    everything = {name: points for each in curves.values() for name, points in each.items() if points}
    panels = [(label, list(drawn)) for label, names in _panels(everything) if (drawn := _present(everything, names))]
    if not panels:
        return False
    figure, places = _figure(len(panels), title, dpi)
    for axes, (label, names) in zip(places, panels, strict=False):
        for number, of_train in enumerate(curves.values()):
            for name, stroke in zip(names, itertools.cycle(_STROKES)):
                points = of_train.get(name, [])
                if points:
                    axes.plot(*zip(*points, strict=True), f"C{number}", linestyle=stroke, marker=_marker(points), ms=3)
        if len(names) > 1:  # small: two names with their strokes are as wide as the panel
            axes.set_title(f"{label} ({', '.join(_stroked(names))})", fontsize="small")
        else:
            axes.set_title(label)
    handles = [_line(f"C{number}") for number in range(len(curves))]
    figure.legend(handles, list(curves), loc="outside lower center", ncols=1)
    figure.savefig(path)
    return True


_STROKES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}


def _stroked(names: Sequence[str]) -> Iterator[str]:
    return (f"{name} {_STROKES[stroke]}" for name, stroke in zip(names, itertools.cycle(_STROKES)))


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour)


def _figure(panels: int, title: str, dpi: int) -> tuple[Any, list[Any]]:
    """A figure with places for so many panels, each with its axis of steps."""
    from matplotlib.figure import Figure

    rows = math.ceil(panels / 2)
    figure = Figure(figsize=(11, 0.4 + 3.05 * rows), layout="constrained", dpi=dpi)
    figure.suptitle(title)
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in places[:panels]:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for axes in places[panels:]:
        axes.set_axis_off()
    return figure, places


def _marker(points: _Points) -> str | None:
    return "o" if len(points) < 30 else None


def _panels(curves: dict[str, _Points]) -> list[tuple[str, tuple[str, ...]]]:
    """The panels in their order; the rewards of the single functions stand together, behind the whole reward."""
    single = tuple(name for name in curves if name.startswith("reward_") and name not in _NOT_FUNCTIONS)
    return [*_PANELS[:3], ("Reward functions", single), *_PANELS[3:]]


def _present(curves: dict[str, _Points], names: tuple[str, ...]) -> dict[str, _Points]:
    return {name: curves[name] for name in names if curves.get(name)}

"""Pictures of curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PANELS = (
    ("Loss", ("loss", "eval_loss")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_second",)),
)


def curves_of(events: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
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
    if not curves.get("loss"):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=dpi)
    figure.suptitle(title)
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for name in names:
            points = curves.get(name, [])
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(names) > 1 and len(axes.lines) > 1:
            axes.legend()
    figure.savefig(path)
    return True

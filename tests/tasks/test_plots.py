"""The picture of a train's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.plots import curves_of, draw_curves


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"type": "metrics", "time": float(step), "step": step, "values": values}


def test_curves_hold_each_step_once_with_its_first_value_in_order() -> None:
    events = [metrics(1, loss=4.0), metrics(3, loss=2.0), metrics(2, loss=3.0), metrics(3, loss=9.0, grad_norm=1.0)]
    assert curves_of(events) == {"loss": [(1, 4.0), (2, 3.0), (3, 2.0)], "grad_norm": [(3, 1.0)]}


def test_picture_is_drawn_of_a_train_and_not_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    assert not draw_curves([{"type": "phase", "time": 0.0, "name": "training"}], path, "none")
    assert not path.exists()
    assert draw_curves([metrics(1, loss=4.0, eval_loss=4.5), metrics(2, loss=float("nan"))], path, "two")
    assert path.read_bytes().startswith(b"\x89PNG")

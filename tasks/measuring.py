"""Measures a model on held-out rows that ask for no text: by the figures of its method's own inference stage.

Rankings of texts (nDCG, recall), preferences (accuracy, margin), pictures (a distance): what they are, the method says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.datasets import DatasetVersion, Kind
from configs.records import ModelRecord, TrainStatus
from configs.scoring import SCORE_TITLES
from tasks import tracking
from tasks.inference import Generation, measure_rows
from tasks.models import logged_model_id

TEXT_KINDS: tuple[Kind, ...] = ("chat", "chat_tools", "vision")
"""Kinds of rows whose last turn is a text, which answers are scored against."""


class Measurement(BaseModel):
    """The figures of one model on one dataset version; what has the name of a score of answers is in percent too."""

    model: str
    dataset: str
    rows: int
    figures: dict[str, float]


def measure(
    model: ModelRecord,
    version: DatasetVersion,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Measurement:
    """The figures of the model on `samples` rows from the start of the dataset, -1 for all.

    Raises UserError, StageFailed, StageCancelled.
    """
    if samples == -1 or samples >= version.rows:
        found = measure_rows(model, version.path, Generation(), on_events)
        samples = version.rows
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            rows.write_text("".join(_first_rows(version.path, samples)), encoding="utf-8")
            found = measure_rows(model, rows, Generation(), on_events)
    # A stage tells shares, 0 to 1; an accuracy stands in one column with those of answers.
    figures = {name: 100 * value if name in SCORE_TITLES else value for name, value in found.items()}
    return Measurement(model=model.name, dataset=version.reference, rows=samples, figures=figures)


def _first_rows(path: Path, count: int) -> list[str]:
    """The first rows as lines, the paths of their pictures made absolute: they no longer lie beside the rows."""
    lines = []
    with path.open(encoding="utf-8") as file:
        for line in islice(file, count):
            row = json.loads(line)
            if "image" in row:
                row["image"] = str(path.parent / row["image"])
            if "images" in row:
                row["images"] = [str(path.parent / image) for image in row["images"]]
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def measure_and_record(
    model: ModelRecord,
    version: DatasetVersion,
    samples: int = -1,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Measurement:
    """Measure a model in an MLflow run of its own: figures, the dataset, the model's name."""
    outcome = measure(model, version, samples, on_events)
    tags = {"tuneline.model": model.name, "tuneline.dataset": version.reference}
    run_id = tracking.start_run(f"{model.name} on {version.name}", "evaluation", tags)
    status: TrainStatus = "failed"
    try:
        tracking.log_parameters(run_id, {"model": model.name, "dataset": version.reference, "rows": outcome.rows})
        tracking.log_dataset(run_id, version, "evaluation")
        keep_measurement(run_id, outcome, "tuned" if model.stage != "base" else "base", logged_model_id(model))
        status = "completed"
    finally:
        tracking.end_run(run_id, status)
    return outcome


def keep_measurement(run_id: str, outcome: Measurement, which: str, model_id: str | None = None) -> None:
    """Record the figures as metrics (of the logged model too) and as a file."""
    tracking.log_scores(run_id, {f"{name}_{which}": value for name, value in outcome.figures.items()}, model_id)
    tracking.mlflow_client().log_dict(run_id, outcome.model_dump(mode="json"), f"evaluation/figures_{which}.json")

"""Makes the pictures of an inference job, or measures how far the model's pictures are from those it is to resemble."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from methods import contract
from methods.image_generation import pictures
from methods.image_generation.pictures import Order, Settings

_MOST_MEASURED = 32
_BINS = 8


def answer(job: contract.Job, pipeline: Any, settings: Settings) -> dict[str, object]:
    """Answer `inputs.requests` into `predictions.jsonl`, or measure `inputs.evaluation_rows`; returns the result."""
    if "evaluation_rows" in job.inputs:
        return measure(job, pipeline, settings)
    with Path(job.inputs["requests"]).open(encoding="utf-8", newline="\n") as lines:
        orders = [pictures.order_of(json.loads(line), settings, job.seed) for line in lines]
    started = time.monotonic()
    path = job.output / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, order in enumerate(orders):
            image = job.output / f"{number:04}.png"
            _painted(job, pipeline, order, number, len(orders)).save(image)
            told = {"image": str(image), "seed": order.seed, **order.settings.__dict__}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    return {"predictions": str(path), "rows": len(orders), "seconds": time.monotonic() - started}


def measure(job: contract.Job, pipeline: Any, settings: Settings) -> dict[str, object]:
    """How far pictures of the captions of stored rows are from the images of these rows; 0 is the same colours.

    `colour_distance`: between the mean colours of both, of 441 at most. `histogram_distance`: the share of pixels
    that would have to take another colour. At most 32 rows, evenly spread; each has a seed of its own.
    """
    import numpy as np
    from PIL import Image

    rows_file = Path(job.inputs["evaluation_rows"])
    with rows_file.open(encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    if not rows:
        raise contract.Refused("there are no rows to measure the model on")
    chosen = rows[:: -(-len(rows) // _MOST_MEASURED)]
    colours, histograms = [], []
    for number, row in enumerate(chosen):
        order = Order(row["caption"], job.seed + number, settings)
        made = np.asarray(_painted(job, pipeline, order, number, len(chosen)).convert("RGB"))
        with Image.open(rows_file.parent / row["image"]) as opened:
            real = np.asarray(opened.convert("RGB"))
        colours.append(float(np.linalg.norm(made.mean((0, 1)) - real.mean((0, 1)))))
        histograms.append(float(np.abs(_histogram(made) - _histogram(real)).sum() / 2))
    figures = {"colour_distance": float(np.mean(colours)), "histogram_distance": float(np.mean(histograms))}
    return {"figures": figures, "rows": len(chosen)}


def _painted(job: contract.Job, pipeline: Any, order: Order, done: int, total: int) -> Any:
    """The next picture. Raises Cancelled if the job is to stop."""
    if job.cancelled:
        raise contract.Cancelled
    picture = pictures.paint(pipeline, order)
    job.progress(done + 1, total)
    return picture


def _histogram(pixels: Any) -> Any:
    """Share of the pixels in each of 8 × 8 × 8 colours."""
    import numpy as np

    flat = pixels.reshape(-1, 3)
    return np.histogramdd(flat, bins=_BINS, range=((0, 256),) * 3)[0] / len(flat)

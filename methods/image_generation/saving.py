"""Makes the complete model of an image train: the LoRA fused into its base, or the whole trained pipeline; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods import contract
from methods.image_generation import pictures
from methods.image_generation.pictures import Order

TOLERANCE = {"float32": 2.0, "bfloat16": 16.0}
"""Greatest allowed difference of a pixel's colour (0 to 255) on average over the picture, by the dtype of the weights:
rounding moves a picture a little, and another one is farther away."""
SEEDS = (1, 2)


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write the complete pipeline in `dtype`."""
    import torch

    trained = job.inputs["trained"]
    base, adapter = (job.inputs["base_model"], trained) if job.inputs["adapter"] else (trained, None)
    pipeline = pictures.load_pipeline(base, adapter, "float32", "cpu")
    if adapter is not None:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    pipeline.to(getattr(torch, dtype)).save_pretrained(job.output, safe_serialization=True)
    for name in (pictures.SETTINGS, pictures.PROBES):
        shutil.copyfile(Path(trained) / name, job.output / name)


def verify(job: contract.Job, dtype: str) -> dict[str, float]:
    """Prove that what was saved makes the pictures of what was trained, and not those of the base.

    Returns the distances, mean difference of a pixel's colour. Raises Refused with them where they say otherwise.
    """
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    reference = (base, trained) if job.inputs["adapter"] else (trained, None)
    orders = _orders(trained)
    expected, saved, untouched = (
        _paint_all(model, adapter, orders) for model, adapter in (reference, (str(job.output), None), (base, None))
    )
    figures = {
        "merged_to_reference": _distance(saved, expected),
        "merged_to_base": _distance(saved, untouched),
        "reference_to_base": _distance(expected, untouched),
        "tolerance": TOLERANCE[dtype],
        "pictures": len(orders),
    }
    if figures["reference_to_base"] == 0:
        raise contract.Refused("the trained model makes the same pictures as its base: training has changed nothing")
    if figures["merged_to_reference"] > min(figures["tolerance"], figures["reference_to_base"]):
        raise contract.Refused(
            f"the saved model does not make the trained one's pictures: they differ by "
            f"{figures['merged_to_reference']:.3g} of 255, {dtype} explains at most {figures['tolerance']:.3g}, and "
            f"training has moved them by {figures['reference_to_base']:.3g}"
        )
    return figures


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    dtype = pictures.training_dtype(job.parameters["dtype"])
    job.phase("fusing" if job.inputs["adapter"] else "saving")
    save_complete(job, dtype)
    job.phase("verifying")
    figures = verify(job, dtype)
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    return {"model": str(job.output), "dtype": dtype, "verification": figures}


def _orders(trained: str) -> list[Order]:
    probes = json.loads((Path(trained) / pictures.PROBES).read_text(encoding="utf-8"))["probes"]
    settings = pictures.read_settings(trained)
    few = replace(settings, steps=min(settings.steps, 8))
    return [Order(probe["request"]["caption"], seed, few) for probe in probes for seed in SEEDS]


def _paint_all(base: str, adapter: str | None, orders: list[Order]) -> list[Any]:
    """Each model is loaded on its own, in float32, so that no more than one is in memory."""
    import numpy as np

    pipeline = pictures.load_pipeline(base, adapter, "float32")
    return [np.asarray(pictures.paint(pipeline, order), dtype=float) for order in orders]


def _distance(one: list[Any], other: list[Any]) -> float:
    return max(float(abs(a - b).mean()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    contract.run(main)

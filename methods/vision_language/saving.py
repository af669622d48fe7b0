"""Makes the complete model of a vision-language train: base and adapter merged, or all trained weights; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import images, merging, probing, remote_code, vision_models
from methods.toolkit.vision_rows import load_renderer


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write the complete weights in `dtype` with the processor that training used."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    if job.inputs["adapter"]:
        merging.save_weights(merging.merged(base, trained, vision_models.load_model), job.output, dtype)
    else:
        merging.save_weights(vision_models.load_model(trained, "float32"), job.output, dtype)
    processor, _ = vision_models.load_processor(trained)
    processor.save_pretrained(job.output)
    remote_code.carry(base, job.output)
    shutil.copyfile(Path(trained) / probing.PROBES_FILE, job.output / probing.PROBES_FILE)


def verify(job: contract.Job, dtype: str) -> merging.Verification:
    """Prove that what was saved is what was trained, by the logits of prompts with images."""
    base, trained, saved = job.inputs["base_model"], job.inputs["trained"], str(job.output)
    renderer = load_renderer(trained)
    probes = probing.read_probes(Path(trained))
    if not probes:
        raise contract.Refused(f"{trained} holds no {probing.PROBES_FILE}: the merged weights cannot be verified")

    def inputs(probe: dict[str, Any]) -> dict[str, Any]:
        talk = images.conversation(probe["messages"], [])
        return dict(renderer.encode([talk], prompt=True))

    def load(model: str, on_top: str | None) -> Callable[[], Any]:
        return partial(vision_models.load_with_adapter, model, on_top, "float32")

    reference = load(base, trained) if job.inputs["adapter"] else load(trained, None)
    return merging.compare(reference, load(saved, None), load(base, None), probes, dtype, inputs)


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    return merging.save_and_prove(job, save_complete, verify, "logits")


if __name__ == "__main__":
    contract.run(main)

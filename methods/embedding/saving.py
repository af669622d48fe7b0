"""Makes the complete model of an embedding train: base and adapter merged, or the full weights; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.embedding import encoders, probes
from methods.toolkit import merging

FULL = "float32"


def load_trained(job: contract.Job) -> Any:
    """What training has left, in float32."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    if job.inputs["adapter"]:
        return encoders.load_customized(base, trained, FULL, job.folder)
    return encoders.load_encoder(trained, FULL)


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write one folder of sentence-transformers without an adapter, its weights in `dtype`.

    Never from a base in fewer bits: the sum would be rounded twice.
    """
    model = load_trained(job)
    if job.inputs["adapter"]:
        model[0].model = merged(job, type(model.transformers_model))
    model.to(getattr(torch, dtype))
    model.save_pretrained(str(job.output), create_model_card=False)
    shutil.copyfile(Path(job.inputs["trained"]) / probes.PROBES_FILE, job.output / probes.PROBES_FILE)


def merged(job: contract.Job, kind: Any) -> Any:
    """The transformer of the base, of the class `kind`, with the adapter added to its weights."""
    from peft import PeftModel

    plain = kind.from_pretrained(encoders.weights_folder(job.inputs["base_model"]), dtype=torch.float32)
    return PeftModel.from_pretrained(plain, job.inputs["trained"]).merge_and_unload(safe_merge=True)


def verify(job: contract.Job, dtype: str) -> merging.Verification:
    """Prove that the saved model gives the vectors of what was trained, and not those of the base. Raises Refused."""
    texts = probes.read_probes(Path(job.inputs["trained"]))

    def vectors(load: Callable[[], Any]) -> torch.Tensor:
        found: torch.Tensor = encoders.encode(load(), texts)
        return found

    reference = vectors(lambda: load_trained(job))
    merged = vectors(lambda: encoders.load_encoder(str(job.output), FULL))
    base = vectors(lambda: encoders.load_encoder(job.inputs["base_model"], FULL))
    scale = float(reference.abs().max())
    result = merging.Verification(
        merged_to_reference=float((merged - reference).abs().max()),
        merged_to_base=float((merged - base).abs().max()),
        reference_to_base=float((reference - base).abs().max()),
        scale=scale,
        tolerance=merging.TOLERANCE[dtype] * scale,
        tokens=len(texts),
    )
    merging.judge(result, dtype)
    return result


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    weights = encoders.weights_folder(job.inputs["base_model"])
    return merging.save_and_prove(job, save_complete, verify, "vectors", weights)


if __name__ == "__main__":
    contract.run(main)

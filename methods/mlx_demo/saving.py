"""Makes the complete model of an SFT train: base and adapter merged, or the fully trained weights; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import shutil
from pathlib import Path

from methods import contract
from methods.toolkit import chat, merging, models, probing


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write the complete weights in `dtype` with the tokenizer that training used."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    if job.inputs["adapter"]:
        merging.merge(base, trained, job.output, dtype)
    else:
        merging.save_weights(models.load_model(trained, "float32"), job.output, dtype)
    tokenizer, _ = chat.load_tokenizer(trained)
    tokenizer.save_pretrained(job.output)
    shutil.copyfile(Path(trained) / probing.PROBES_FILE, job.output / probing.PROBES_FILE)


def verify(job: contract.Job, dtype: str) -> merging.Verification:
    """Prove that what was saved is what was trained."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    prompts = merging.probe_prompts(Path(trained))
    if job.inputs["adapter"]:
        return merging.verify(base, trained, None, job.output, prompts, dtype)
    return merging.verify(base, None, trained, job.output, prompts, dtype)


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    dtype = merging.saving_dtype(job.inputs["base_model"], job.parameters["dtype"])
    job.phase("merging" if job.inputs["adapter"] else "saving")
    save_complete(job, dtype)
    job.phase("verifying")
    verification = verify(job, dtype)
    print(
        f"logits: merged to trained {verification.merged_to_reference:.3g} (allowed {verification.tolerance:.3g}), "
        f"merged to base {verification.merged_to_base:.3g}",
        flush=True,
    )
    return {"model": str(job.output), "dtype": dtype, "verification": verification.as_dict()}


if __name__ == "__main__":
    contract.run(main)

"""Makes the complete model of a reward train: base, adapter and head in one, or the fully trained weights; verified.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from methods import contract
from methods.toolkit import chat, merging, models, probing, remote_code


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write the complete weights in `dtype` with the tokenizer that training used."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    tokenizer, _ = chat.load_tokenizer(trained)
    if job.inputs["adapter"]:
        model = merging.merged(base, trained, models.load_scorer)
    else:
        model = models.load_scorer(trained, "float32")
    # A score is read at the last token that is not this one. Of an adapter it is the trained tokenizer's.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    merging.save_weights(model, job.output, dtype)
    tokenizer.save_pretrained(job.output)
    remote_code.carry(base, job.output)
    shutil.copyfile(Path(trained) / probing.PROBES_FILE, job.output / probing.PROBES_FILE)


def verify(job: contract.Job, dtype: str) -> merging.Verification:
    """Prove by the scores of the probe texts that what was saved is what was trained."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    start, adapter = (base, trained) if job.inputs["adapter"] else (trained, None)

    def load_reference() -> Any:
        return models.load_with_adapter(start, adapter, "float32", models.load_scorer)

    def load_saved() -> Any:
        return models.load_with_adapter(str(job.output), None, "float32", models.load_scorer)

    def load_base() -> Any:
        """The base under the trained head: it has none of its own to compare with."""
        model, saved = models.load_scorer(base, "float32").eval(), load_saved().state_dict()
        body = f"{model.base_model_prefix}."
        model.load_state_dict({name: saved[name] for name in saved if not name.startswith(body)}, strict=False)
        return model

    prompts = merging.probe_prompts(Path(trained))
    return merging.compare(load_reference, load_saved, load_base, prompts, dtype)


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    return merging.save_and_prove(job, save_complete, verify, "scores")


if __name__ == "__main__":
    contract.run(main)

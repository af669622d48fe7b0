"""Makes the complete model of a train with a technique that can be merged; verified. A trained prompt is refused.

Run as: python saving.py JOB_DIR
"""

from __future__ import annotations

import json
from pathlib import Path

from methods import contract
from methods.peft.techniques import TECHNIQUES
from methods.toolkit import saving_chat


def refuse_prompts(trained: Path) -> None:
    """Refuse, before anything is loaded, what no weights of a base model can hold. Raises Refused."""
    kind = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    if not any(technique.mergeable for technique in TECHNIQUES.values() if technique.kind == kind):
        raise contract.Refused(
            f"{kind.lower()} trains a prompt beside the model, which cannot be merged into its weights: it stays a "
            "customized model. Ask it as it is, or deploy it with the target custom."
        )


def main(job: contract.Job) -> dict[str, object]:
    """Save from the job folder; returns where the complete model lies and the figures of its proof."""
    refuse_prompts(Path(job.inputs["trained"]))
    return saving_chat.save_and_verify(job)


if __name__ == "__main__":
    contract.run(main)

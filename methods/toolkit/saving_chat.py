"""What training and saving leave of a chat model: adapter or weights, tokenizer, probes; complete and verified."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils import GENERATION_CONFIG_NAME

from methods import contract
from methods.toolkit import chat, merging, models, probing, processes, remote_code, tokenizing


def save_trained(
    job: contract.Job,
    trainer: Any,
    tokenizer: Any,
    conversations: Iterable[tokenizing.Conversation],
    outcome: dict[str, float],
) -> dict[str, object]:
    """Save the adapter (or the full weights), the tokenizer and the prompts of the first conversations as probes.

    Returns the result of a training stage.
    """
    if job.is_main:
        probing.write_probes(job.output, tokenizer, conversations)
    return save_model(job, trainer, tokenizer, outcome)


def save_model(job: contract.Job, trainer: Any, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights) and the tokenizer; returns the result of a training stage.

    Of several processes the main one writes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    generation = getattr(model, "generation_config", None)  # a reward model has none
    if generation is not None:
        # What a server stops at: where the template ends a turn with another token than the base stops at, it is added.
        generation.eos_token_id = chat.end_tokens(tokenizer)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(job.output))  # gathers the parts of all processes
        (job.output / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
    elif job.is_main:
        models.save_trained(trainer.model, job.output)
    adapter = isinstance(model, PeftModel)
    if job.is_main:
        chat.save_tokenizer(tokenizer, job.output)
        if adapter and generation is not None:
            generation.save_pretrained(job.output)
        remote_code.carry(job.inputs["base_model"], job.output)
    processes.wait_for_all()
    return {"model": str(job.output), "adapter": adapter, **outcome}


def save_and_verify(job: contract.Job) -> dict[str, object]:
    """Save the complete model of a train and prove it; returns the result of a saving stage. Raises Refused."""
    return merging.save_and_prove(job, save_complete, verify, "logits")


def save_complete(job: contract.Job, dtype: str) -> None:
    """Write the complete weights in `dtype` with the tokenizer that training used."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    if job.inputs["adapter"]:
        merging.merge(base, trained, job.output, dtype)
    else:
        merging.save_weights(models.load_model(trained, "float32"), job.output, dtype)
    tokenizer, _ = chat.load_tokenizer(trained)
    tokenizer.save_pretrained(job.output)
    remote_code.carry(base, job.output)
    # The generation settings hold the end tokens of training: those of the base may lack some.
    for name in (probing.PROBES_FILE, GENERATION_CONFIG_NAME):
        if (Path(trained) / name).exists():
            shutil.copyfile(Path(trained) / name, job.output / name)


def verify(job: contract.Job, dtype: str) -> merging.Verification:
    """Prove that what was saved is what was trained."""
    base, trained = job.inputs["base_model"], job.inputs["trained"]
    prompts = merging.probe_prompts(Path(trained))
    if job.inputs["adapter"]:
        return merging.verify(base, trained, None, job.output, prompts, dtype)
    return merging.verify(base, None, trained, job.output, prompts, dtype)

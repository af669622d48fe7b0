"""Turns a GGUF file into a folder of safetensors that every stage can load.

Run as: python convert_gguf.py JOB_DIR   (inputs: `gguf`, the file; the folder is written to the job's output)
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods import contract


def main(job: contract.Job) -> dict[str, object]:
    """Convert; returns the folder and the number of parameters."""
    file = Path(job.inputs["gguf"])
    job.phase("converting the weights")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The loaded model calls itself quantised and refuses to be saved: its weights go into a fresh one.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(job.output)
    tokenizer.save_pretrained(job.output)
    return {"model": str(job.output), "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    contract.run(main)

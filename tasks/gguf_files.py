"""A complete model as one GGUF file, made by llama.cpp's converter and quantiser."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from configs.endpoints import Deployment, Quantization
from configs.errors import UserError
from tasks.files import last_lines
from tasks.llama_cpp import LlamaCpp
from tasks.model_folders import read_json
from tasks.model_server import EndpointWork, run_tool, server_environment

# As they are: a float32 model stays one. `auto` of the converter would make 16 bits of it.
_AS_THEY_ARE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback quantization")


def make_gguf(
    work: EndpointWork,
    deployment: Deployment,
    tools: LlamaCpp,
    quantization: Quantization | None,
    *,
    bfloat16: bool = True,
) -> tuple[Path, list[str]]:
    """The deployment's GGUF file, made unless it is there, and what one ought to know of it.

    Without `bfloat16` such weights become float32, which holds each of them exactly, for who cannot read them.
    Raises UserError with the end of the log if llama.cpp does not know the architecture or the tokenizer.
    """
    folder = work.folder / "deployments" / deployment.model
    file = folder / f"{deployment.model}.gguf"
    if file.is_file():
        return file, deployment.notes
    folder.mkdir(parents=True, exist_ok=True)
    plain, notes = folder / "converting.gguf", []
    kind = _kind(deployment.model_path)
    kind = "f32" if kind == "bf16" and not bfloat16 else kind
    _need_space(folder, deployment.model_path, quantization is not None, kind)
    try:
        _convert(work, deployment, tools, plain, kind)
        made = plain
        if quantization is not None:
            made = folder / "quantising.gguf"
            notes = _quantise(work, deployment, tools, plain, made, quantization)
        made.replace(file)  # by this name only when it is whole
    finally:
        for left in (plain, folder / "quantising.gguf"):
            left.unlink(missing_ok=True)
    return file, notes


def discard_gguf(deployment: Deployment) -> None:
    """Delete the deployment's GGUF file, whole or half-made."""
    for file in deployment.log.parent.glob("*.gguf"):
        file.unlink()


def _kind(model: Path) -> str:
    """What the converter calls the type of the weights."""
    config = read_json(model / "config.json")
    return _AS_THEY_ARE.get(str(config.get("dtype") or config.get("torch_dtype")), "auto")


def _convert(work: EndpointWork, deployment: Deployment, tools: LlamaCpp, file: Path, kind: str) -> None:
    command: list[str | Path] = [
        sys.executable,
        tools.converter,
        deployment.model_path,
        "--outfile",
        file,
        "--outtype",
        kind,
    ]
    environment = server_environment({"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    code = run_tool(work, [*command, "--model-name", deployment.model], deployment.log, environment)
    if code != 0 or not file.is_file():
        raise UserError(
            f"llama.cpp cannot convert this model (exit code {code}). The end of the log:\n"
            f"{last_lines(deployment.log, 12)}",
            file=deployment.log,
            mend="deploy it to the target transformers",
        )


def _quantise(
    work: EndpointWork, deployment: Deployment, tools: LlamaCpp, plain: Path, file: Path, quantization: Quantization
) -> list[str]:
    offset = deployment.log.stat().st_size
    command: list[str | Path] = [tools.quantiser, plain, file, quantization.upper()]
    code = run_tool(work, command, deployment.log, server_environment())
    if code != 0 or not file.is_file():
        raise UserError(
            f"llama.cpp could not quantise this model (exit code {code}). The end of the log:\n"
            f"{last_lines(deployment.log, 12, offset)}",
            file=deployment.log,
        )
    fallback = _FALLBACK.search(last_lines(deployment.log, 400, offset))
    if fallback is None:
        return []
    return [f"{fallback[1]} of {fallback[2]} tensors have no shape for {quantization} and keep more bits"]


def _need_space(folder: Path, model: Path, quantised: bool, kind: str) -> None:
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    widened = 2 if kind == "f32" and _kind(model) != "f32" else 1
    needed = weights * widened * (2 if quantised else 1)  # a quantised file stands beside the plain one for a moment
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"there is too little space to convert the model: {free / 1e9:.1f} GB are free",
            file=folder,
            expected=f"about {needed / 1e9:.1f} GB",
        )

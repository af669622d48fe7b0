"""Program: converts one PyTorch weights file (pytorch_model*.bin) to safetensors and compares every tensor.

`PYTHON convert_bin.py SOURCE_BIN TARGET_SAFETENSORS RESULT_JSON LIMITS_JSON`. LIMITS_JSON: `{"memory", "seconds",
"file"}` in bytes, seconds of CPU time, bytes. The process limits itself to them before it opens the source. RESULT_JSON
gets `{"tensors": {NAME: bytes}, "shared": [NAME...]}`, or `{"refused": why}`.

The source is unpickled with `weights_only`: tensors, numbers, texts and plain containers; any other global is refused.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

_LARGEST_GROWTH = 2  # views of one storage may overlap; a file of tensors that all do would expand without end


class _Unusable(Exception):
    """The source holds something else than named tensors."""


def limit_process(limits: dict[str, int]) -> None:
    """Limit address space, CPU time, file size and core dumps of this process, for good."""
    chosen = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_CPU: limits["seconds"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in chosen.items():
        _, hard = resource.getrlimit(kind)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (allowed, allowed))


def load_tensors(source: Path) -> dict[str, Any]:
    """The tensors of the file by name, on the CPU. Raises _Unusable for a file that holds anything else."""
    import torch

    try:
        # Only the newer format, a zip archive, can be mapped instead of read.
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        raise _Unusable(f"it is not a plain file of weights: {_reason(error)}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, TypeError) as error:
        raise _Unusable(f"PyTorch cannot read it: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if isinstance(content, dict) and set(content) == {"state_dict"}:
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise _Unusable(f"it holds a {type(content).__name__}; expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _Unusable(f"{name!r} is a {type(tensor).__name__}; expected a tensor under each name")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise _Unusable(f"{name!r} is not a dense tensor")
    return dict(content)


def separate(tensors: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors as safetensors takes them, each with memory of its own, and the names that shared one before.

    Tied weights, which the source holds once under two names, are written under both.
    """
    seen: dict[int, str] = {}
    separated, shared = {}, []
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and storage in seen:
            shared += [seen[storage], name]
            tensor = tensor.clone()
        elif tensor.numel():
            seen[storage] = name
        separated[name] = tensor.detach().contiguous()
    return separated, sorted(set(shared))


def compare(tensors: dict[str, Any], target: Path) -> None:
    """Compare what was written with its source, bit by bit. Raises _Unusable for the first difference."""
    import torch
    from safetensors import safe_open

    with safe_open(target, framework="pt") as written:
        if set(written.keys()) != set(tensors):
            raise _Unusable("the written file has other names than its source")
        for name, tensor in tensors.items():
            found = written.get_tensor(name)
            same = found.dtype == tensor.dtype and found.shape == tensor.shape
            if not same or not torch.equal(_bits(found), _bits(tensor)):
                raise _Unusable(f"{name!r} differs from its source after it was written")


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write the tensors of `source` to `target`; returns the size in bytes of each, and which shared memory."""
    from safetensors.torch import save_file

    tensors = load_tensors(source)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    if sum(sizes.values()) > _LARGEST_GROWTH * source.stat().st_size:
        raise _Unusable(f"its tensors would take {sum(sizes.values())} bytes, over twice the size of the file")
    separated, shared = separate(tensors)
    save_file(separated, target, metadata={"format": "pt"})
    compare(tensors, target)
    return {"tensors": sizes, "shared": shared}


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _reason(error: Exception) -> str:
    """The sentence of PyTorch's message that names what was refused, without its advice to load it all the same."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "operand" in line]
    return (named or lines or ["?"])[0].removeprefix("WeightsUnpickler error: ")[:300]


def main() -> None:
    """Convert the file of the command line."""
    source, target, result, limits = map(Path, sys.argv[1:])
    limit_process(json.loads(limits.read_text(encoding="utf-8")))
    try:
        done = convert(source, target)
    except (_Unusable, MemoryError) as error:
        target.unlink(missing_ok=True)
        done = {"refused": str(error) or "it takes more memory than a conversion may have"}
    result.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the device computes with: the number type that `dtype: auto` becomes, and a warning for one it only emulates.

torch is imported where it is needed: mlx-demo's environment, which has none, reads modules that import this one.
"""

from __future__ import annotations

import os
import platform
from typing import Literal, cast, get_args

from methods import contract

Device = Literal["cuda", "mps", "cpu"]

NATIVE_VARIABLE = "TUNELINE_NATIVE_BFLOAT16"
"""Environment variable that overrides the probe: `yes` or `no`."""

_X86_FEATURES = ("avx512_bf16", "amx_bf16")
_ARM_FEATURES = ("bf16", "sve_bf16")
_EMULATING_CHIPS = ("Apple M1", "Apple M2")  # Metal computes bfloat16 there by way of float32
_FIRST_NATIVE_CAPABILITY = 8
"""Major CUDA compute capability of Ampere; Volta (V100) and Turing (T4) have no bfloat16 units."""


def training_device() -> Device:
    """The kind of device that a trainer puts the model on."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def inference_device() -> Device:
    """The kind of device that `models.load_model` puts a model on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def kind_of(device: str) -> Device:
    """The kind of a device as torch names it, such as `cuda:1`. Raises Refused for one of no known kind."""
    for kind in get_args(Device):
        if device.partition(":")[0] == kind:
            return cast(Device, kind)
    raise contract.Refused(f"device {device!r}: expected one of {', '.join(get_args(Device))}")


def computes_bfloat16(device: Device) -> bool:
    """Whether the device has instructions for bfloat16 products, as torch reports it.

    TUNELINE_NATIVE_BFLOAT16=yes|no overrides the probe. Raises Refused for any other value of it.
    """
    override = os.environ.get(NATIVE_VARIABLE, "").strip().lower()
    if override in ("yes", "no"):
        return override == "yes"
    if override:
        raise contract.Refused(f"{NATIVE_VARIABLE}={override!r}: expected yes or no; unset it to probe the device")
    return {"cuda": _cuda, "mps": _mps, "cpu": _cpu}[device]()


def _cuda() -> bool:
    import torch

    majors = [torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())]
    return bool(min(majors) >= _FIRST_NATIVE_CAPABILITY)


def _mps() -> bool:
    import torch

    new_enough = bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return new_enough and not chip_name("mps").startswith(_EMULATING_CHIPS)


def _cpu() -> bool:
    import torch

    # Without oneDNN torch has no bfloat16 matrix product that uses these instructions.
    features = torch.cpu.get_capabilities()
    wanted = _ARM_FEATURES if features.get("architecture") == "arm64" else _X86_FEATURES
    return bool(torch.backends.mkldnn.is_available()) and any(features.get(name, False) for name in wanted)


def resolve_dtype(name: str, device: Device | None = None) -> str:
    """The number type that a `dtype` parameter names: `auto` is bfloat16 where the device computes it, else float32.

    `device` is where the model computes; by default where models are loaded to.
    """
    if name != "auto":
        return name
    return "bfloat16" if computes_bfloat16(device or inference_device()) else "float32"


def emulation_warning(dtype: str, device: Device) -> str | None:
    """Why a chosen number type is slow on this device; None if the device computes it natively."""
    if dtype != "bfloat16" or computes_bfloat16(device):
        return None
    return (
        f"dtype bfloat16 is emulated on {describe(device)}, which computes float32 many times faster: "
        "set dtype to auto or float32"
    )


def describe(device: Device) -> str:
    """The device in words, with what decides how it computes bfloat16."""
    import torch

    name = chip_name(device)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"{name} (CUDA compute capability {major}.{minor})"
    if device == "mps":
        return f"{name} (MPS)"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def chip_name(device: Device) -> str:
    """What the maker calls the device."""
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    if device == "mps":
        return str(torch.backends.mps.get_name())
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def settle_dtype(job: contract.Job, device: Device) -> None:
    """Put the number type that `auto` becomes into the parameters of a training job, and report it; warn of emulation.

    Called before anything is loaded. A job that names no dtype is left alone.
    """
    chosen = job.parameters.get("dtype")
    if chosen is None:
        return
    warn_of_emulation(job, device)
    resolved = resolve_dtype(chosen, device)
    if chosen == "auto":
        job.resolved("dtype", resolved, "hardware", describe(device))
        print(f"dtype auto is {resolved} on {describe(device)}", flush=True)
    job.parameters["dtype"] = resolved


def warn_of_emulation(job: contract.Job, device: Device) -> None:
    """Warn of a chosen number type that the device only emulates; called before anything is loaded."""
    warning = emulation_warning(job.parameters["dtype"], device)
    if warning is not None:
        job.warning(warning)

"""What the hardware computes with, asked of a stage's interpreter: tasks load no torch themselves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from pydantic import BaseModel, Field

from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from tasks.stages import stage_environment

_PROGRAM = PROJECT_ROOT / "methods" / "toolkit" / "measure_hardware.py"
_TIMEOUT = 120.0


class Hardware(BaseModel):
    """The device that training computes on."""

    device: str
    described: str
    auto: str = Field(description="Number type that `dtype: auto` is on it.")
    auto_inference: str = Field(description="The same where models answer: on a Mac that is the processor.")
    warnings: dict[str, str] = Field(description="Why a number type is slow on it, by its name.")
    gflops: float | None = Field(default=None, description="Float32 products: 10^9 operations a second by the clock.")
    cpu_share: float | None = Field(default=None, description="Share of the time in which its threads had a core.")


def ask_hardware(python: Path, *, speed: bool = False) -> Hardware | None:
    """The hardware as the interpreter's torch sees it, with its measured `speed` if asked; None without a torch.

    Raises UserError for a TUNELINE_NATIVE_BFLOAT16 that is neither yes nor no.
    """
    command = [str(python), str(_PROGRAM), *(["--speed"] if speed else [])]
    try:
        done = subprocess.run(
            command, env=stage_environment(), capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):  # an environment without torch, as that of mlx-demo
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise UserError(found["refused"], field="TUNELINE_NATIVE_BFLOAT16")
    return Hardware.model_validate(found)


def dtype_warning(dtype: str, python: Path) -> str | None:
    """Why the chosen number type is slow on this host; None if it is not, or is `auto`."""
    if dtype != "bfloat16":  # the only one that hardware emulates
        return None
    hardware = ask_hardware(python)
    return hardware.warnings.get(dtype) if hardware is not None else None

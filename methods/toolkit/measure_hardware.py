"""Program: what this interpreter's torch computes with, as one line of JSON, for tasks that load no torch themselves.

`python measure_hardware.py [--speed]`; with `--speed` float32 products are timed for about a second.
"""

from __future__ import annotations

import json
import sys
import time

from methods.contract import Refused
from methods.toolkit import hardware

_SIDE = 768  # of square matrices: about the hidden size of a small model
_SECONDS = 1.0


def measured_speed(device: hardware.Device) -> dict[str, float]:
    """`gflops`: billions of operations a second in float32 products of square matrices on the device, by the clock.

    `cpu_share`: how much of the time its threads were given a core; below 1 other programs use them too.
    """
    import torch

    left, right = torch.rand(2, _SIDE, _SIDE, device=device)
    float((left @ right).sum())  # the first product starts the threads, and sets a GPU up
    started, used, products = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < _SECONDS:
        made = left @ right
        float(made[0, 0])  # waits for a GPU
        products += 1
    seconds = time.perf_counter() - started
    threads = torch.get_num_threads() if device == "cpu" else 1
    return {
        "gflops": 2 * _SIDE**3 * products / seconds / 1e9,
        "cpu_share": min(1.0, (time.process_time() - used) / (seconds * threads)),
    }


def main() -> None:
    """Print the device in words, what `dtype: auto` is on it, and a warning for each number type it emulates."""
    try:
        device = hardware.training_device()
        warnings = {name: hardware.emulation_warning(name, device) for name in ("bfloat16", "float32")}
        found: dict[str, object] = {
            "device": device,
            "described": hardware.describe(device),
            "auto": hardware.resolve_dtype("auto", device),
            "auto_inference": hardware.resolve_dtype("auto"),
            "warnings": {name: text for name, text in warnings.items() if text is not None},
            **(measured_speed(device) if "--speed" in sys.argv[1:] else {}),
        }
    except Refused as refusal:
        found = {"refused": str(refusal)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

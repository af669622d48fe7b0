"""What the processes of one training agree on, where it is spread over several; alone, each says what it is given.

torch is imported where it is needed: mlx-demo's environment, which has none, reads modules that import this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_spread() -> bool:
    """Whether this training runs in several processes."""
    from torch import distributed

    started = distributed.is_available() and distributed.is_initialized()
    return bool(started and distributed.get_world_size() > 1)


def any_of(flag: bool, device: Any) -> bool:
    """Whether the flag is set in any of the processes; all of them are to ask at the same step."""
    return bool(summed([int(flag)], device)[0])


def summed(counts: Sequence[int], device: Any) -> list[int]:
    """Each count, summed over all processes; all of them are to ask at the same step."""
    if not is_spread():
        return list(counts)
    import torch
    from torch import distributed

    total = torch.tensor(counts, dtype=torch.int64, device=device)
    distributed.all_reduce(total)
    return [int(count) for count in total]


def wait_for_all() -> None:
    """Go on when every process is here."""
    if is_spread():
        from torch import distributed

        distributed.barrier()


def is_parted(model: torch.nn.Module) -> bool:
    """Whether the processes hold parts of the model (FSDP): then all of them take part in whatever it computes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

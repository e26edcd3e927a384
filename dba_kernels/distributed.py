"""Process-group seams: everything the library sends between ranks goes through here."""

from __future__ import annotations

import torch
import torch.distributed as dist


def refuse_sharded(name: str, param: torch.Tensor) -> None:
    """Raise ValueError for a DTensor: the step works on plain tensors."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(param, DTensor):
            raise ValueError(
                f"parameter {name!r}: expected a plain tensor, got a DTensor; use DDP, which keeps them whole"
            )


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in ``group``; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum ``tensor`` over the ranks of ``group`` in place; with one process nothing happens."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor

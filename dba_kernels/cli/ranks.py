"""Several processes under ``torchrun``: who this one is, and the group they form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """What ``torchrun`` set, or one process."""
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return cls(rank, world, local)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """The group of all processes, within :meth:`group`; None where there is one."""
        return dist.group.WORLD if self.world > 1 else None

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """The default process group, where there is more than one process."""
        if self.world == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

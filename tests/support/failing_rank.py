"""A script for torchrun in which rank 1 fails: ``python -m torch.distributed.run … failing_rank.py WHERE FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dba_kernels import collect_global_gradient

from .distributed_model import loss_of, make_net, make_optimizer, sharded, train


def mean_loss(net: torch.nn.Module, step: int) -> torch.Tensor:
    return loss_of(net, step)


def collect(rank: int, world: int, folder: Path, failing: int | None = None) -> None:
    """Six micro-batches of a sharded model; the loss of one of them may fail on rank 1."""

    def loss(net: torch.nn.Module, step: int) -> torch.Tensor:
        if rank == 1 and step == failing:
            raise ValueError(f"row {step} of rank 1 is broken")
        return mean_loss(net, step)

    net = sharded(make_net(), world)
    snapshots = {"snapshot_path": folder / "sums.safetensors", "snapshot_every": 2}
    collect_global_gradient(net, range(6), loss, "int8", save_to=folder / "gg.safetensors", **snapshots)


def flip(file: Path) -> None:
    """One bit of the sums."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def main(where: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if where == "snapshot":
        collect(rank, world, folder)
        if rank == 1:
            for file in folder.glob("*.rank1-*"):
                flip(file)
        collect(rank, world, folder)
    elif where == "loss":
        collect(rank, world, folder, failing=3)
    else:
        net = sharded(make_net(), world)
        optimizer = make_optimizer(net)
        train(net, optimizer, range(2), rank, world)
        if rank == 1:  # a state edited in place
            del optimizer.state[net.embed.weight]["exp_avg_sq"]
        train(net, optimizer, range(2, 4), rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""``python -m bench.wire``: what a collection over ranks sends, against synchronising every micro-batch.

Each rank holds the whole model and sees its own micro-batches. *One reduction*: ``GlobalGradientCollector`` sums on
every rank and calls ``reduce()`` at the end. *Every micro-batch*: DistributedDataParallel averages each gradient, and
the averages are summed. Bytes are those handed to all-reduce by one rank, counted where it is called; a ring sends
2·(n−1)/n of them. Time is gloo's on this machine's loopback: with a network in between, bytes count for more.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dba_kernels import GlobalGradientCollector

from .harness import Comparison, compare


def make_model(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def one_reduction(model: nn.Module, batches: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
    """Bytes handed to all-reduce, and the sums over all ranks."""
    sent, real = 0, dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return real(tensor, *args, **kwargs)

    collector = GlobalGradientCollector(model)
    with collector:
        for batch in collector.remaining(batches):
            collector.backward(model(batch).square().mean())
    dist.all_reduce = counting
    try:
        collector.reduce()
    finally:
        dist.all_reduce = real
    return sent, collector._sums.totals


class EveryMicroBatch:
    """The same of gradients that DistributedDataParallel averages one by one."""

    def __init__(self, model: nn.Module) -> None:
        self.sent = 0
        self.model = DistributedDataParallel(model)
        self.model.register_comm_hook(None, self._count)

    def _count(self, group, bucket):  # no annotations: DDP reads them, and not as strings
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    def __call__(self, batches: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        self.sent, params = 0, list(self.model.parameters())
        sums = [torch.zeros_like(p) for p in params]
        for batch in batches:
            self.model(batch).square().mean().backward()
            for total, param in zip(sums, params, strict=True):
                total += param.grad * dist.get_world_size()
            self.model.zero_grad()
        return self.sent, sums


def on_rank(rank: int, world: int, folder: str, width: int, layers: int, batches: int, rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = make_model(width, layers)
    g = torch.Generator().manual_seed(rank)
    data = [torch.randn(16, width, generator=g) for _ in range(batches)]
    every_micro_batch = EveryMicroBatch(make_model(width, layers))
    (once, sums), (often, others) = one_reduction(model, data), every_micro_batch(data)
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(sums, others, strict=True))
    assert error < 1e-5, f"the two sides disagree by {error:.1e}"
    # No budget of time: ranks must agree on the number of rounds.
    times = compare(lambda: every_micro_batch(data), lambda: one_reduction(model, data), rounds, budget=math.inf)
    if rank == 0:
        report(world, sum(p.numel() for p in model.parameters()), batches, once, often, times)
    dist.barrier()
    dist.destroy_process_group()


def report(world: int, numel: int, batches: int, once: int, often: int, times: Comparison) -> None:
    print(f"{world} ranks, {numel:,} parameters, {batches} micro-batches per rank, fp32 gradients")
    print(f"{'':24} {'bytes':>14} {'per parameter':>14} {'median':>12}   ratio (quartiles)")
    baseline = sorted(times.baseline)[len(times.baseline) // 2]
    print(f"{'every micro-batch (DDP)':24} {often:>14,} {often / numel:>14.2f} {baseline * 1e3:9.2f} ms    1")
    print(f"{'one reduction':24} {once:>14,} {once / numel:>14.2f} {times}")


@click.command()
@click.option("--ranks", default=2, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--batches", default=16, show_default=True, help="micro-batches per rank")
@click.option("--rounds", default=9, show_default=True)
def main(ranks: int, width: int, layers: int, batches: int, rounds: int) -> None:
    """Bytes and time of collecting over RANKS processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (ranks, folder, width, layers, batches, rounds), nprocs=ranks)


if __name__ == "__main__":
    main()

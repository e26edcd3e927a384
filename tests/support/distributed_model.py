"""A small model of awkward shapes, and its training on one process or on a part of the data per rank."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.base_model import fingerprint

WORDS, STEPS = 101, 5


class Body(nn.Module):
    """97 rows, odd columns; five rows of a 3-D tensor, of which four ranks get 2, 2, 1 and 0; odd vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 97)
        self.mix = nn.Parameter(torch.randn(5, 97, 11) * 0.05)
        self.down = nn.Linear(55, 48)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("...i,rio->...ro", self.up(x).tanh(), self.mix).flatten(-2)
        return self.norm(x + self.down(mixed))


class Net(nn.Module):
    """Tied embeddings around the body."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 48)
        self.body = Body()
        self.head = nn.Linear(48, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def sharded(net: Net, world: int, replicas: int = 1, **options: Any) -> Net:
    """FSDP2 over all ranks, or HSDP over ``replicas`` groups of them."""
    shape = (world,) if replicas == 1 else (replicas, world // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(net.body, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def tensors(net: nn.Module, step: int, scale: float) -> dict[str, torch.Tensor]:
    """Random tensors of the parameters' (global) shapes."""
    g = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(tuple(p.shape), generator=g) * scale for name, p in net.named_parameters()}


def make_global(format: str = "int8", rank: int | None = None) -> GlobalGradient:
    net = make_net()
    return GlobalGradient.from_tensors(
        tensors(net, -1, 0.01), format, rank, fingerprint=fingerprint(net.named_parameters())
    )


def make_optimizer(net: nn.Module, lr: float = 1e-3, **options: Any) -> DBAAdamW:
    """With a global gradient unless ``options`` say otherwise; warnings about the rate and the few steps are not."""
    options = {"global_gradient": make_global(), "total_steps": 400, "boost": "paper"} | options
    if options["global_gradient"] is None:
        del options["total_steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DBAAdamW(net.named_parameters(), lr=lr, **options)


def loss_of(net: nn.Module, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Mean loss of this rank's part of the step's eight sequences; parts are equal: the ranks' mean is the whole's."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, WORDS, (8, 7), generator=g).chunk(world)[rank]
    return nn.functional.cross_entropy(net(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        loss_of(net, step, rank, world).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered if it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in net.named_parameters()}


def displacement_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ‖Δgot − Δexpected‖ / ‖Δexpected‖ of a tensor, Δ the way from the start."""
    start = weights(make_net())
    return max(
        ((got[name] - expected[name]).double().norm() / (expected[name] - start[name]).double().norm()).item()
        for name in expected
    )

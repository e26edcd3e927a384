"""The anchor under FSDP2 and DDP, and curvature collected in parts, in real processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dba_kernels import GlobalGradient, collect_global_gradient
from dba_kernels.reference import anchor

from .support.distributed_model import (
    STEPS,
    WORDS,
    displacement_error,
    make_net,
    make_optimizer,
    sharded,
    train,
    weights,
)
from .support.ranks import run_ranks
from .support.tolerances import TOLERANCES

CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {"anchor": 20.0, "max_grad_norm": 0.5},
    "int8": {"anchor": 20.0, "state_format": "int8"},
}
CURVATURE = 8


def token_batches(count: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(99)
    return [torch.randint(0, WORDS, (4, 7), generator=g) for _ in range(count)]


def token_loss(net: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    targets = ids[:, 1:].flatten()
    return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), targets), len(targets)


@pytest.fixture(scope="module")
def general() -> GlobalGradient:
    with tempfile.TemporaryDirectory() as folder:
        found = collect_global_gradient(make_net(), token_batches(), token_loss, curvature=CURVATURE)
        yield GlobalGradient.load(found.save(Path(folder) / "general.safetensors"))


def result(net: nn.Module, path: Path, config: str, rank: int = 0, world: int = 1) -> tuple[dict, float]:
    """Weights at the end, and the rise predicted where the last step began."""
    optimizer = make_optimizer(net, global_gradient=GlobalGradient.load(path), anchor_every=1, **CONFIGS[config])
    train(net, optimizer, range(STEPS - 1), rank, world)
    before = optimizer.metrics()["predicted_rise"]
    train(net, optimizer, range(STEPS - 1, STEPS), rank, world)
    shards = any(isinstance(param, DTensor) for param in net.parameters())
    return weights(net), optimizer.metrics()["predicted_rise"] if shards else before


def train_everything(rank: int, world: int, path: Path) -> dict[str, Any]:
    found = {f"fsdp {config}": result(sharded(make_net(), world), path, config, rank, world) for config in CONFIGS}
    found["ddp fp32"] = result(nn.parallel.DistributedDataParallel(make_net()), path, "fp32", rank, world)
    if world == 4:
        found["hsdp fp32"] = result(sharded(make_net(), world, replicas=2), path, "fp32", rank, world)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_end_where_one_process_does(general: GlobalGradient, world: int) -> None:
    """Protects Q over all ranks' rows, uneven and empty parts included: the weights and figures of one process."""
    expected = {config: result(make_net(), general.path, config) for config in CONFIGS}
    for found in run_ranks(train_everything, world, general.path):
        for name, (got, rise) in found.items():
            config = name.split()[1]
            limit = TOLERANCES["ranks, int8" if config == "int8" else "ranks"].bound
            assert displacement_error(got, expected[config][0]) < limit, name
            assert rise == pytest.approx(expected[config][1], rel=1e-2), name


def test_without_the_other_ranks_rows_it_ends_elsewhere(general: GlobalGradient) -> None:
    """Negative control: another anchor moves the weights by more than ranks may."""
    expected, _ = result(make_net(), general.path, "fp32")
    net = make_net()
    optimizer = make_optimizer(net, global_gradient=general, anchor=18.0, anchor_every=1, max_grad_norm=0.5)
    train(net, optimizer, range(STEPS))
    assert displacement_error(weights(net), expected) > TOLERANCES["ranks"].bound


def collect_part(rank: int, world: int) -> tuple[dict[str, torch.Tensor], float | None]:
    """H·1 of every parameter, collected in parts, and the calibration."""
    found = collect_global_gradient(
        make_net(), token_batches()[rank::world], token_loss, "fp32", curvature=CURVATURE, group=dist.group.WORLD
    )
    ones = {name: torch.ones(record.shape) for name, record in found.curvature_records.items()}
    return {name: anchor.hessian_product(found.curvature(name), one) for name, one in ones.items()}, found.calibration


def test_ranks_collect_one_curvature() -> None:
    """Protects reduce(): all ranks hold the curvature of all the data, and the same calibration."""
    whole = collect_global_gradient(make_net(), token_batches(), token_loss, "fp32", curvature=CURVATURE)
    results = run_ranks(collect_part, 2)
    assert results[0][1] == results[1][1]
    for products, _ in results:
        for name, got in products.items():
            want = anchor.hessian_product(whole.curvature(name), torch.ones(got.shape))
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def collect_sharded(rank: int, world: int) -> str:
    with pytest.raises(ValueError, match="curvature: expected a whole model") as caught:
        collect_global_gradient(
            sharded(make_net(), world), token_batches(), token_loss, curvature=CURVATURE, save_to="g.safetensors"
        )
    return str(caught.value)


def test_sharded_models_are_refused() -> None:
    """Protects FSDP2 users: a collection that would see a part of the data only is refused by name."""
    assert all("FSDP2" in message for message in run_ranks(collect_sharded, 2))

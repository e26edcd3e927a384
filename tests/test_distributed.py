"""Training under DDP and FSDP2 in real processes: the single-process result, one message per step, refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from dba_kernels import DBAAdamW
from dba_kernels.plan import Plan

from .support.distributed_model import (
    STEPS,
    displacement_error,
    loss_of,
    make_global,
    make_net,
    make_optimizer,
    sharded,
    train,
    weights,
)
from .support.ranks import run_ranks
from .support.tolerances import TOLERANCES

Named = dict[str, torch.Tensor]

CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": lambda: {"max_grad_norm": 0.5},
    "int8": lambda: {"max_grad_norm": 0.5, "state_format": "int8"},
    "plain": lambda: {"global_gradient": None},
    "lowrank": lambda: {"global_gradient": make_global("int8", rank=8)},
    "agem over all": lambda: {"correction": "agem", "correction_scope": "global", "max_grad_norm": 0.5},
}


def limit_of(config: str) -> float:
    return TOLERANCES["ranks, int8" if config == "int8" else "ranks"].bound


# --- a model's gradients ----------------------------------------------------------------------------------------------


def result(net: nn.Module, config: str, rank: int = 0, world: int = 1) -> tuple[Named, dict[str, float]]:
    optimizer = make_optimizer(net, **CONFIGS[config]())
    train(net, optimizer, range(STEPS), rank, world)
    return weights(net), optimizer.metrics()


@contextlib.contextmanager
def counted_all_reduces() -> Iterator[list[int]]:
    """Elements of every all-reduce within the block."""
    sizes: list[int] = []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counting):
        yield sizes


def communication(world: int, **options: Any) -> tuple[int, list[int]]:
    """Number of parameters, and the elements of each all-reduce of a second step."""
    net = sharded(make_net(), world)
    optimizer = make_optimizer(net, **options)
    train(net, optimizer, range(1))
    loss_of(net, 1).backward()
    with counted_all_reduces() as sizes:
        optimizer.step()
    return len(list(net.parameters())), sizes


def replicated_beside_sharded(rank: int, world: int) -> tuple[Named, dict[str, float]]:
    """One layer is left whole, and its gradient averaged by hand, as FSDP2's ``ignored_params`` asks."""
    net = make_net()
    left_out = set(net.body.down.parameters())
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)), ignored_params=left_out)
    optimizer = make_optimizer(net, **CONFIGS["fp32"]())
    for step in range(STEPS):
        loss_of(net, step, rank, world).backward()
        for param in left_out:
            dist.all_reduce(param.grad)
            param.grad /= world
        optimizer.step()
        optimizer.zero_grad()
    return weights(net), optimizer.metrics()


def train_everything(rank: int, world: int) -> dict[str, Any]:
    """Every configuration under FSDP2 and DDP, and the ways in which each could go wrong."""
    found: dict[str, Any] = {}
    for config in CONFIGS if world == 2 else ("fp32", "int8", "lowrank"):
        found[f"fsdp {config}"] = result(sharded(make_net(), world), config, rank, world)
    for config in ("fp32", "int8"):
        net = nn.parallel.DistributedDataParallel(make_net())
        found[f"ddp {config}"] = result(net, config, rank, world)
    found["fsdp left out"] = replicated_beside_sharded(rank, world)
    found["messages"] = communication(world, **CONFIGS["int8"]())
    found["no messages"] = communication(world, **CONFIGS["plain"]())

    found["wrong: no ranks' sums"] = with_ranks_sums_left_out(rank, world)
    net = nn.parallel.DistributedDataParallel(make_net())
    with net.no_sync():
        found["wrong: no sync"] = result(net, "fp32", rank, world)
    if world == 2:
        found["mixed"] = mixed_precision(rank, world)
        found["skipped"] = non_finite_rows(rank, world)
        found["skipped by a scaler"] = non_finite_rows(rank, world, torch.amp.GradScaler("cpu", init_scale=1024.0))
        found["refused"] = refused_layouts(world)
    else:
        found["fsdp replicated twice"] = result(sharded(make_net(), world, replicas=2), "fp32", rank, world)
    return found


def with_ranks_sums_left_out(rank: int, world: int) -> tuple[Named, dict[str, float]]:
    with mock.patch.object(Plan, "gather_sums", lambda *_: None):
        return result(sharded(make_net(), world), "fp32", rank, world)


def mixed_precision(rank: int, world: int) -> tuple[Named, dict[str, float]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return result(sharded(make_net(), world, mp_policy=policy), "int8", rank, world)


def non_finite_rows(rank: int, world: int, scaler: torch.amp.GradScaler | None = None) -> tuple[bool, dict[str, float]]:
    """Rank 1 alone sees an infinity: did any weight move anywhere? With a scaler, plain AdamW, which sends nothing."""
    net = sharded(make_net(), world)
    optimizer = make_optimizer(net) if scaler is None else make_optimizer(net, global_gradient=None)
    before = weights(net)
    loss = loss_of(net, 0, rank, world)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if rank == 1:
        net.embed.weight.grad.to_local()[0, 0] = torch.inf
    optimizer.step() if scaler is None else scaler.step(optimizer)
    after = weights(net)
    return all(torch.equal(before[name], after[name]) for name in before), optimizer.metrics()


@pytest.fixture(scope="module")
def trained() -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what every rank found."""
    return {world: run_ranks(train_everything, world) for world in (2, 4)}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Named, dict[str, float]]]:
    return {config: result(make_net(), config) for config in CONFIGS}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_single_process_result(world: int, trained: dict, expected: dict) -> None:
    """Protects every way in which a shard, a row of ĝ_G or a sum could be the wrong one: similarity, clip norm, low
    rank, compressed state, uneven and empty shards, tied embeddings, HSDP, tensors left whole beside sharded ones."""
    ranks = trained[world]
    for name in [name for name in ranks[0] if name.startswith(("fsdp", "ddp"))]:
        config = name.split(" ", 1)[1]
        reference, figures = expected.get(config, expected["fp32"])
        for rank in ranks:
            assert displacement_error(rank[name][0], reference) < limit_of(config), (world, name)
            assert rank[name][1] == ranks[0][name][1], f"{name}: metrics differ between ranks"
            assert rank[name][1] == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_wrong_on_ranks_is_noticed(world: int, trained: dict, expected: dict) -> None:
    """Negative control of the test above: local sums only, and DDP that does not synchronise."""
    for name in [name for name in trained[world][0] if name.startswith("wrong")]:
        errors = [displacement_error(rank[name][0], expected["fp32"][0]) for rank in trained[world]]
        assert max(errors) > 10 * limit_of("int8"), (name, errors)


def test_one_small_message_per_step(trained: dict) -> None:
    """Protects the wire: two numbers per parameter in one all-reduce; plain AdamW sends nothing."""
    for rank in trained[2] + trained[4]:
        parameters, sizes = rank["messages"]
        assert sizes == [2 * parameters]
        assert rank["no messages"] == (parameters, [])


def test_non_finite_rows_skip_the_step_everywhere(trained: dict) -> None:
    """Protects agreement of ranks: non-finite rows of one rank skip the step on all of them."""
    for how in ("skipped", "skipped by a scaler"):
        for unmoved, figures in (rank[how] for rank in trained[2]):
            assert unmoved and (figures["steps"], figures["skipped_steps"]) == (0, 1), how


def test_mixed_precision_trains_like_autocast_would(trained: dict, expected: dict) -> None:
    """bf16 compute moves the fp32 weights near to where fp32 compute does: not to its bits, far from nowhere."""
    error = displacement_error(trained[2][0]["mixed"][0], expected["int8"][0])
    assert limit_of("int8") < error < 0.5


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused_layouts(world: int) -> dict[str, str]:
    """The message of every layout that is not supported."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}

    def attempt(name: str, params: list[tuple[str, torch.Tensor]]) -> None:
        for _, param in params:
            param.grad = torch.zeros_like(param)
        try:
            DBAAdamW(params).step()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)

    def placed(placement: Any, mesh: Any = mesh) -> nn.Parameter:
        return nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [placement]))

    attempt("columns", [("layer.weight", placed(Shard(1)))])
    attempt("partial", [("layer.weight", placed(Partial()))])
    other = init_device_mesh("cpu", (world, 1))
    elsewhere = nn.Parameter(distribute_tensor(torch.ones(4, 4), other, [Shard(0), Shard(0)]))
    attempt("meshes", [("a", placed(Shard(0))), ("b", elsewhere)])
    param = placed(Shard(0))
    optimizer = DBAAdamW([("whole", param)])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].full_tensor()
    optimizer._plan = None
    try:
        optimizer.step()
    except ValueError as error:
        found["whole state"] = str(error)
    for orig in (False, True):
        net = FullyShardedDataParallel(make_net(), use_orig_params=orig, device_id=torch.device("cpu"))
        attempt(f"FSDP1 {orig}", [(name, p) for name, p in net.named_parameters() if p.numel()])
        attempt(f"FSDP1 unnamed {orig}", [("p", p) for p in net.parameters() if p.numel()])
    return found


def test_other_layouts_are_refused_by_name(trained: dict) -> None:
    """Protects against wrong norms: layouts that cut rows apart are refused with the parameter's name."""
    messages = trained[2][0]["refused"]
    for name in ("columns", "partial"):
        assert "parameter 'layer.weight': expected Replicate() or Shard(0)" in messages[name]
        assert "use fully_shard without a shard_placement_fn" in messages[name]
    assert "parameter 'b': expected the device mesh" in messages["meshes"]
    assert "exp_avg of 'whole': expected the parameter's layout" in messages["whole state"]
    assert "set_optimizer_state_dict" in messages["whole state"]
    for name in [name for name in messages if name.startswith("FSDP1")]:
        assert "FSDP1 has flattened" in messages[name] and "fully_shard" in messages[name], name


def test_zero_is_refused() -> None:
    """What DeepSpeed leaves in the groups: stages 1 and 2 one flat tensor each, stage 3 parameters with ``ds_id``."""
    net = make_net()
    optimizer = DBAAdamW(net.named_parameters())
    flat = nn.Parameter(torch.zeros(100))
    flat.grad = torch.ones(100)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"param_groups\[0\]: expected 8 parameters.*got 1; DeepSpeed ZeRO.*FSDP2"):
        optimizer.step()
    flat.ds_id = 0
    with pytest.raises(ValueError, match=r"parameter 'flat': expected the model's own tensor.*ZeRO-3.*FSDP2"):
        DBAAdamW([("flat", flat)]).step()

"""Optimizer state over ranks: the same bits from any number of them, through checkpoints, and past a killed rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from dba_kernels import DBAAdamW
from dba_kernels.distributed import local
from dba_kernels.plan import Plan
from dba_kernels.stepdata import ParamTensors

from .support.distributed_model import make_net, make_optimizer, sharded, tensors
from .support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Named = dict[str, torch.Tensor]

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "split8, int8": (torch.bfloat16, {"param_format": "split8", "state_format": "int8"}),
    "split16, bf16": (torch.bfloat16, {"param_format": "split16", "state_format": "bf16"}),
    "native, int8": (torch.float32, {"state_format": "int8"}),
}
SAVED, ALL = 3, 5
"""Steps before the checkpoint, and in all."""


def make(name: str, world: int | None) -> tuple[nn.Module, DBAAdamW]:
    """World None: plain tensors. Nothing here depends on sums, whose last bits depend on the number of ranks."""
    dtype, formats = FORMATS[name]
    net = make_net(dtype)
    if world is not None:
        sharded(net, world)
    return net, make_optimizer(net, correction="none", **formats)


def give(net: nn.Module, optimizer: DBAAdamW, start: int, stop: int) -> Named:
    """Steps with gradients that no rank computed; weights and state after them, of which each rank has its part."""
    for step in range(start, stop):
        for param, grad in zip(net.parameters(), tensors(net, step, 0.01).values(), strict=True):
            grad = grad.to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, param in net.named_parameters():
        found[name] = local(param).detach().clone()
        found.update({f"{name}/{key}": local(value).clone() for key, value in optimizer.state[param].items()})
    return found


def differing(got: Named, expected: Named, rank: int = 0, world: int = 1) -> list[str]:
    """Names of what is not, bit for bit, this rank's rows of what is expected."""
    assert got.keys() == expected.keys()
    return [key for key in expected if not torch.equal(got[key], rows_of(expected[key], rank, world))]


def rows_of(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    parts = tensor.chunk(world) if tensor.dim() else [tensor] * world
    return parts[rank] if rank < len(parts) else tensor[:0]


# --- checkpoints, as a user writes them -------------------------------------------------------------------------------


def save(net: nn.Module, optimizer: DBAAdamW, folder: Path) -> None:
    """A checkpoint counts when its folder has its name, which it gets when all ranks have written."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}.tmp")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        os.replace(f"{folder}.tmp", folder)


def load(net: nn.Module, optimizer: DBAAdamW, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def on_ranks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Two ranks save; the other numbers of ranks load what they saved."""
    found: dict[str, Any] = {}
    for name in FORMATS:
        net, optimizer = make(name, world)
        before = give(net, optimizer, 0, SAVED)
        if world == 2:
            save(net, optimizer, folder / name)
            found[f"{name}, flattened"] = through(name, net, optimizer, flatten_optimizer_state_dict=True)
            if "split16" not in name:  # its 16-bit integers are what neither gloo nor NCCL sends
                found[f"{name}, gathered"] = through(name, net, optimizer, full_state_dict=True)
        found[name] = before, give(net, optimizer, SAVED, ALL)
        for kind, saved in (("loaded", name), ("plain", f"{name}, plain")):
            net, optimizer = make(name, world)
            load(net, optimizer, folder / saved)
            found[f"{name}, {kind}"] = give(net, optimizer, 0, 0), give(net, optimizer, SAVED, ALL)
    found["wrong: no offsets"] = without_offsets(world)
    found["wrong: not loaded"] = give(*make("split8, int8", world), SAVED, ALL)
    found["allocated"] = allocation(rank, world)
    if world == 2:
        found["mixed"] = mixed(world)
    return found


def through(name: str, net: nn.Module, optimizer: DBAAdamW, **kind: bool) -> tuple[Named, Named]:
    """Into another optimizer by other kinds of state dict: whole tensors on every rank, or groups in flat keys."""
    options = StateDictOptions(**kind)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    other, its_optimizer = make(name, 2)
    set_state_dict(
        other, its_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
    )
    return give(other, its_optimizer, 0, 0), give(other, its_optimizer, SAVED, ALL)


def without_offsets(world: int) -> Named:
    def tensors_of(self: Plan, *args: Any) -> ParamTensors:
        return replace(real(self, *args), offset=0)

    real: Callable[..., ParamTensors] = Plan._tensors_of
    with mock.patch.object(Plan, "_tensors_of", tensors_of):
        return give(*make("split8, int8", world), 0, ALL)


def allocation(rank: int, world: int) -> dict[str, Any]:
    """Learning rate 0 on empty state: zero gradients allocate; a gradient on the last rank alone makes it a step."""
    found = {}
    for what in ("zeros", "one rank"):
        net, optimizer = make("native, int8", world)
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        if what == "one rank" and rank == world - 1:
            net.embed.weight.grad.to_local().fill_(1.0)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        state = optimizer.state[net.embed.weight]
        found[what] = optimizer.metrics().get("steps"), sorted(state), isinstance(state["exp_avg_scale"], DTensor)
    return found


def mixed(world: int) -> tuple[Named, dict[str, float], set[str]]:
    """One group of plain parameters, a large one among them, and sharded ones: result, figures, names of the plain."""
    dtype, formats = FORMATS["split8, int8"]
    net = make_net(dtype)
    sharded(net, world, ignored_params={net.embed.weight, *net.body.norm.parameters()})
    optimizer = make_optimizer(net, correction="none", **formats)
    result = give(net, optimizer, 0, ALL)
    plain = {name for name, param in net.named_parameters() if not isinstance(param, DTensor)}
    return result, optimizer.metrics(), plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what one process without a group has saved."""
    made = tmp_path_factory.mktemp("checkpoints")
    for name in FORMATS:
        net, optimizer = make(name, None)
        give(net, optimizer, 0, SAVED)
        save(net, optimizer, made / f"{name}, plain")
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(on_ranks, world, folder) for world in (2, 1, 3, 4)}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Named, Named]]:
    """On plain tensors, by format: weights and state at the checkpoint and at the end."""
    trained = {}
    for name in FORMATS:
        net, optimizer = make(name, None)
        trained[name] = give(net, optimizer, 0, SAVED), give(net, optimizer, SAVED, ALL)
    assert trained["split8, int8"][0]["embed.weight/exp_avg"].dtype == torch.int8
    return trained


@pytest.mark.parametrize("name", FORMATS)
def test_given_gradients_give_the_same_bits_on_any_number_of_ranks(name: str, found: dict, expected: dict) -> None:
    """Protects stochastic rounding keyed by the place in the whole tensor, groups that lie in rows, and formats that
    follow from the global shape (a shard of 26 rows is below the size from which tensors are compressed)."""
    for world, ranks in found.items():
        for rank, result in enumerate(ranks):
            for got, want in zip(result[name], expected[name], strict=True):
                assert differing(got, want, rank, world) == []


@pytest.mark.parametrize("name", FORMATS)
def test_saved_state_loads_on_any_number_of_ranks(name: str, found: dict, expected: dict, folder: Path) -> None:
    """Protects checkpoints of two ranks and of one process: the very codes, and the same bits after going on; on plain
    tensors and whole ones too."""
    loaded = [
        (ranks[rank][f"{name}, {kind}"], rank, world)
        for kind in ("loaded", "plain")
        for world, ranks in found.items()
        for rank in range(world)
    ]
    for kind in ("flattened", "gathered"):
        loaded += [
            (result[f"{name}, {kind}"], i, 2) for i, result in enumerate(found[2]) if f"{name}, {kind}" in result
        ]
    for saved in (name, f"{name}, plain"):
        net, optimizer = make(name, None)
        load(net, optimizer, folder / saved)
        loaded.append(((give(net, optimizer, 0, 0), give(net, optimizer, SAVED, ALL)), 0, 1))
    assert len(loaded) == 2 * (1 + 2 + 3 + 4) + 2 + 2 * ("split16" not in name) + 2
    for result, rank, world in loaded:
        for got, want in zip(result, expected[name], strict=True):
            assert differing(got, want, rank, world) == []


def test_plain_and_sharded_parameters_share_a_group(found: dict, expected: dict) -> None:
    """Protects mixed groups (``ignored_params``): the bits of one process, and norms that count plain tensors once."""
    net, optimizer = make("split8, int8", None)
    give(net, optimizer, 0, ALL)
    whole = optimizer.metrics()
    for rank, result in enumerate(found[2]):
        got, metrics, plain = result["mixed"]
        assert plain == {"embed.weight", "body.norm.weight", "body.norm.bias"}
        want = {
            key: value if key.partition("/")[0] in plain else rows_of(value, rank, 2)
            for key, value in expected["split8, int8"][1].items()
        }
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        assert {k: v for k, v in metrics.items() if "norm" in k or "cosine" in k} == pytest.approx(
            {k: v for k, v in whole.items() if "norm" in k or "cosine" in k},
            rel=1e-5,  # reductions in fp32 over other parts
        )
    assert whole["grad_norm"] > 0 and whole["cosine_max"] != 0


def test_other_bits_are_noticed(found: dict, expected: dict) -> None:
    """Negative controls: rounding by the place in the shard, and going on without the state."""
    for world, ranks in found.items():
        if world > 1:
            wrong = differing(ranks[1]["wrong: no offsets"], expected["split8, int8"][1], 1, world)
            assert "embed.weight/remainder" in wrong, world
        wrong = differing(ranks[0]["wrong: not loaded"], expected["split8, int8"][1], 0, world)
        assert "embed.weight/exp_avg" in wrong, world


def test_a_step_that_only_allocates_is_decided_by_all_ranks(found: dict) -> None:
    """Protects checkpoint loading: whether a step only allocates is decided by all ranks together."""
    keys = ["exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "step"]
    for ranks in found.values():
        for rank in ranks:
            assert rank["allocated"] == {"zeros": (None, keys, True), "one rank": (1, keys, True)}


# --- a rank is killed while it saves ----------------------------------------------------------------------------------


def killed_while_saving(rank: int, world: int, folder: Path) -> None:
    net, optimizer = make("split8, int8", world)
    give(net, optimizer, 0, SAVED)
    save(net, optimizer, folder / "step-3")
    give(net, optimizer, SAVED, ALL)
    if rank == 1:  # when its data are written and not yet synced
        with mock.patch("os.fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL)):
            save(net, optimizer, folder / "step-5")
    save(net, optimizer, folder / "step-5")


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path, expected: dict) -> None:
    """Protects the pattern of :func:`save`: what has its name is whole. What has not is no checkpoint."""
    run_ranks(killed_while_saving, 2, tmp_path, killed=(1,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-5.tmp"]
    net, optimizer = make("split8, int8", None)
    with pytest.raises(dcp.api.CheckpointException):
        load(net, optimizer, tmp_path / "step-5.tmp")
    net, optimizer = make("split8, int8", None)
    load(net, optimizer, tmp_path / "step-3")
    assert differing(give(net, optimizer, 0, 0), expected["split8, int8"][0]) == []
    assert differing(give(net, optimizer, SAVED, ALL), expected["split8, int8"][1]) == []

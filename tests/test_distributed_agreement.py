"""Ranks must use the same global gradient in the same way; otherwise replicas drift apart without a word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dba_kernels import method
from dba_kernels.distributed import answers_of_ranks

from .support.distributed_model import make_global, make_net, make_optimizer, sharded, train
from .support.ranks import run_ranks


def attempt(rank: int, world: int, shard: bool, **options: Any) -> str:
    """Two steps; what they said."""
    net = make_net()
    trained: Any = sharded(net, world) if shard else torch.nn.parallel.DistributedDataParallel(net)
    optimizer = make_optimizer(trained, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            train(trained, optimizer, range(2), rank, world)
        except ValueError as error:
            return str(error)
    return "; ".join(str(warning.message) for warning in told if "ranks" in str(warning.message))


def on_ranks(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Every way to disagree, and copies of one file, which is none."""
    here = folder / f"{rank}"
    here.mkdir()
    make_global("int8").save(here / "same.safetensors")
    make_global("int8" if rank == 0 else "int4").save(here / "other.safetensors")
    found = {}
    for kind, shard in (("replicas", False), ("sharded", True)):
        found[f"{kind}, copies"] = attempt(rank, world, shard, global_gradient=here / "same.safetensors")
        found[f"{kind}, files"] = attempt(rank, world, shard, global_gradient=here / "other.safetensors")
        found[f"{kind}, length"] = attempt(rank, world, shard, total_steps=400 + rank)
    found["boost"] = attempt(rank, world, False, boost=0.1 * (1 + rank))
    # Rank 1 without one: the others refuse; it goes on alone until they end.
    options: dict[str, Any] = {} if rank == 0 else {"global_gradient": None}
    net = make_net()
    optimizer = make_optimizer(net, **options)
    dist.barrier()
    try:
        train(net, optimizer, range(2))
        found["none"] = ""
    except ValueError as error:
        found["none"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(on_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["replicas", "sharded"])
def test_another_global_gradient_on_one_rank_is_refused_by_all(kind: str, found: list[dict[str, str]]) -> None:
    """Protects replicas from drifting apart: a stale copy on one node, or another length, is named on every rank."""
    for rank, said in enumerate(found):
        message = said[f"{kind}, files"]
        assert message.startswith("global_gradient: expected the same on every rank, got digest "), message
        assert f"{rank}/other.safetensors) on this one" in message
        assert f"{1 - rank}/other.safetensors) on rank {1 - rank}" in message
        message = said[f"{kind}, length"]
        assert "got settings" in message and "'total_steps': 400" in message and "'total_steps': 401" in message
        assert "'boost': 0.1" in said["boost"] and "'boost': 0.2" in said["boost"]


@pytest.mark.parametrize("kind", ["replicas", "sharded"])
def test_copies_of_one_file_are_the_same(kind: str, found: list[dict[str, str]]) -> None:
    """Negative control: nodes may keep the file where they like."""
    assert [said[f"{kind}, copies"] for said in found] == ["", ""]


def test_a_rank_without_one_is_noticed(found: list[dict[str, str]]) -> None:
    """Protects from plain AdamW on one rank: those that have a global gradient refuse to go on."""
    assert "(in memory) on this one and none on rank 1" in found[0]["none"] and found[1]["none"] == ""


def alone(rank: int, world: int) -> tuple[str, int]:
    """Rank 0 trains, rank 1 does not."""
    with mock.patch.object(method, "PATIENCE", 0.3):
        if rank == 0:
            net = make_net()
            optimizer = make_optimizer(net)
            with (
                warnings.catch_warnings(record=True) as told,
                mock.patch.object(method, "answers_of_ranks", side_effect=answers_of_ranks) as asked,
            ):
                warnings.simplefilter("always")
                train(net, optimizer, range(3))
            return "; ".join(str(warning.message) for warning in told), asked.call_count
    return "", 0


def test_a_rank_that_takes_no_part_holds_nobody_up() -> None:
    """Protects training on one rank of several: it is asked once, missed, said so, and training goes on."""
    said, asked = run_ranks(alone, 2)[0]
    assert "global_gradient: ranks [1] have taken no step with this optimizer" in said
    assert asked == 1

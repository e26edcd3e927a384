"""Collection over ranks: sharded models give the fp64 token-weighted mean, resume after a kill, and write one file."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dba_kernels import GlobalGradient, GlobalGradientCollector
from dba_kernels.collect import collect_global_gradient
from dba_kernels.passes import ShardedModel, WholeModel
from dba_kernels.snapshots import Snapshots
from dba_kernels.sums import GradientSums
from dba_kernels.tensor_files import SavedTensors

from .support.distributed_model import WORDS, loss_of, make_net, sharded
from .support.ranks import run_ranks

MICRO_BATCHES = 5
Batch = torch.Tensor


def batch_of(step: int, rank: int) -> Batch:
    """Token ids; ranks have one to four sequences, so weights differ."""
    g = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, WORDS, (1 + (step + 3 * rank) % 4, 7), generator=g)


def batches_of(rank: int) -> list[Batch]:
    return [batch_of(step, rank) for step in range(MICRO_BATCHES)]


def token_loss(net: nn.Module, ids: Batch) -> tuple[torch.Tensor, int]:
    targets = ids[:, 1:].flatten()
    return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), targets), len(targets)


def mean_loss(net: nn.Module, ids: Batch) -> torch.Tensor:
    return token_loss(net, ids)[0]


def exact_mean(world: int, weighted: bool = True) -> dict[str, torch.Tensor]:
    """Σ w g / Σ w over every rank's micro-batches by autograd alone, in fp64."""
    net = copy.deepcopy(make_net()).double()
    total = 0.0
    for rank in range(world):
        for ids in batches_of(rank):
            loss, tokens = token_loss(net, ids)
            weight = tokens if weighted else 1.0
            (loss * weight).backward()
            total += weight
    return {name: p.grad / total for name, p in net.named_parameters()}


def worst_error(gg: GlobalGradient, exact: dict[str, torch.Tensor]) -> float:
    return max(((gg[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact)


# --- ranks ------------------------------------------------------------------------------------------------------------


def collect_everywhere(rank: int, world: int, folder: Path) -> dict[str, str]:
    """The ways to collect; the messages of what is refused."""
    nets = {"sharded": sharded(make_net(), world)}
    if world == 4:
        nets["replicated twice"] = sharded(make_net(), world, replicas=2)
    for name, net in nets.items():
        gg = collect_global_gradient(net, batches_of(rank), token_loss, "fp32", save_to=folder / f"{name}.safetensors")
        assert gg.path == folder / f"{name}.safetensors"
        assert all(param.grad is None for param in net.parameters())
    net = nets["sharded"]
    with mock.patch.object(ShardedModel, "agreed", WholeModel.agreed):
        collect_global_gradient(net, batches_of(rank), token_loss, "fp32", save_to=folder / "wrong.safetensors")
    not_finite(rank, net, folder)
    if world == 4:
        return {}
    collect_global_gradient(net, batches_of(rank), token_loss, "int8", 8, save_to=folder / "low rank.safetensors")
    options = {"weighting": "batch", "save_to": folder / "batch.safetensors"}
    collect_global_gradient(net, batches_of(rank), token_loss, "fp32", **options)
    collect_global_gradient(net, batches_of(rank), mean_loss, "fp32", save_to=folder / "mean loss.safetensors")
    gg = collect_global_gradient(make_net(), batches_of(rank), token_loss, "fp32", group=dist.group.WORLD)
    if rank == 0:
        gg.save(folder / "whole models.safetensors")
    return refused(rank, world, net, folder)


def not_finite(rank: int, net: nn.Module, folder: Path) -> None:
    """The last rank's second loss is infinite, and one of its rows' gradients in the third."""
    collector = GlobalGradientCollector(net)
    here = rank == dist.get_world_size() - 1
    real = GradientSums.add_rows

    def spoilt(self: GradientSums, grads: list, weight: float) -> None:
        if here and collector.consumed == 3:
            grads[0][0, 0] = torch.inf
        real(self, grads, weight)

    with mock.patch.object(GradientSums, "add_rows", spoilt), collector:
        for step, batch in enumerate(collector.remaining(batches_of(rank))):
            loss, tokens = token_loss(net, batch)
            collector.backward(loss * torch.inf if here and step == 1 else loss, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.finish("fp32", save_to=folder / "not finite.safetensors")


def refused(rank: int, world: int, net: nn.Module, folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}

    def attempt(name: str, action: Any) -> None:
        try:
            action()
            found[name] = "nothing"
        except (ValueError, RuntimeError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    def run(net: nn.Module, **options: Any) -> GlobalGradientCollector:
        collector = GlobalGradientCollector(net, **options)
        with collector:
            collector.backward(*token_loss(net, batch_of(0, rank)))
        return collector

    attempt("no path", lambda: run(net).finish())
    attempt("no ending", lambda: collect_global_gradient(net, [], token_loss, save_to=folder / "gg"))
    attempt("no folder", lambda: run(net).finish(save_to=folder / "missing" / "gg.safetensors"))
    attempt("reduce", lambda: run(net).reduce())
    partly = make_net()
    left_out = set(partly.body.norm.parameters())
    fully_shard(partly, mesh=init_device_mesh("cpu", (world,)), ignored_params=left_out)
    attempt("partly", lambda: GlobalGradientCollector(partly))
    another = make_net()
    with torch.no_grad():
        next(another.parameters()).add_(rank)
    attempt("other weights", run(another).reduce)
    whole = run(make_net())
    whole.reduce()
    attempt("reduce twice", whole.reduce)
    with whole:
        attempt("backward after reduce", lambda: whole.backward(*token_loss(whole.model, batch_of(0, rank))))

    def stepping() -> None:
        optimizer = torch.optim.AdamW(net.parameters())
        with GlobalGradientCollector(net):
            loss_of(net, 0).backward()
            optimizer.step()

    def another_backward() -> None:
        collector = GlobalGradientCollector(net)
        with collector:
            token_loss(net, batch_of(0, rank))[0].backward()
            collector.backward(*token_loss(net, batch_of(0, rank)))

    attempt("stepping", stepping)
    attempt("another backward", another_backward)
    net.zero_grad()
    return found


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list]]:
    """By number of ranks: the folder of files, and what each rank found."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 4)}
    return {world: (folder, run_ranks(collect_everywhere, world, folder)) for world, folder in folders.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_models_give_the_token_weighted_mean(world: int, collected: dict) -> None:
    """Protects the weights: FSDP2 averages over ranks, whose batches have one to four sequences; HSDP."""
    folder, _ = collected[world]
    exact = exact_mean(world)
    files = ["sharded", "whole models" if world == 2 else "replicated twice"]
    loaded = {file: GlobalGradient.load(folder / f"{file}.safetensors") for file in files}
    for file, gg in loaded.items():
        assert worst_error(gg, exact) < 1e-6, file
        gg.check_model(make_net().named_parameters())
        assert gg.provenance.tokens == sum(6 * len(ids) for rank in range(world) for ids in batches_of(rank))
        assert gg.provenance.batches == MICRO_BATCHES * (world if file == "whole models" else 1)


def test_other_weights_and_formats(collected: dict) -> None:
    """Protects ``weighting="batch"``, losses that do not say their number of tokens, factors of gathered tensors."""
    folder, _ = collected[2]
    unweighted = exact_mean(2, weighted=False)
    for file in ("batch", "mean loss"):
        assert worst_error(GlobalGradient.load(folder / f"{file}.safetensors"), unweighted) < 1e-6
    low_rank = GlobalGradient.load(folder / "low rank.safetensors")
    expected = GlobalGradient.from_tensors({n: t.float() for n, t in exact_mean(2).items()}, "int8", 8)
    assert low_rank.record("embed.weight").rank == 8
    assert low_rank.record("embed.weight").energy == pytest.approx(expected.record("embed.weight").energy, rel=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_without_their_weights_are_noticed(world: int, collected: dict) -> None:
    """Negative control: FSDP2's own average over ranks, whatever their numbers of tokens."""
    folder, _ = collected[world]
    assert worst_error(GlobalGradient.load(folder / "wrong.safetensors"), exact_mean(world)) > 1e-2


@pytest.mark.parametrize("world", [2, 4])
def test_the_noise_is_that_of_whole_micro_batches(world: int, collected: dict) -> None:
    """Protects ‖g‖², of which every rank sees its rows only: one process that is given the ranks' batches joined."""
    folder, _ = collected[world]
    joined = [torch.cat([batch_of(step, rank) for rank in range(world)]) for step in range(MICRO_BATCHES)]
    expected = collect_global_gradient(make_net(), joined, token_loss, "fp32").records
    for name, record in GlobalGradient.load(folder / "sharded.safetensors").records.items():
        assert (record.signal, record.noise) == pytest.approx((expected[name].signal, expected[name].noise), rel=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_not_finite_on_one_rank_is_dropped_on_all(world: int, collected: dict) -> None:
    """Protects the mean over ranks: a batch that is not finite on one is dropped on all, and counted once."""
    folder, _ = collected[world]
    gg = GlobalGradient.load(folder / "not finite.safetensors")
    assert (gg.provenance.batches, gg.provenance.dropped_batches) == (MICRO_BATCHES - 1, 1)
    assert [record.dropped for record in gg.records.values()] == [1] + [0] * (len(gg) - 1)
    joined = [torch.cat([batch_of(step, rank) for rank in range(world)]) for step in range(MICRO_BATCHES)]
    for name, left_out in (("embed.weight", {1, 2}), ("body.up.weight", {1})):
        kept = [batch for step, batch in enumerate(joined) if step not in left_out]
        expected = collect_global_gradient(make_net(), kept, token_loss, "fp32")
        assert ((gg[name] - expected[name]).norm() / expected[name].norm()).item() < 1e-5


def test_what_would_go_wrong_is_refused(collected: dict) -> None:
    """Protects a sharded collection: each misuse is refused on every rank, with the reason."""
    for rank, found in enumerate(collected[2][1]):
        assert found["no path"].startswith("ValueError: save_to: expected the path of a file for a model sharded")
        elsewhere = "" if rank == 0 else "RuntimeError: rank 0 failed, and all end with it: "
        assert found["no folder"].startswith(f"{elsewhere}FileNotFoundError: [Errno 2] cannot write")
        assert "ValueError: reduce(): expected a whole model on every rank" in found["reduce"]
        assert "parameter 'body.norm.weight': expected a DTensor as others are" in found["partly"]
        assert "reduce(): expected the same weights on every rank, got different ones" in found["other weights"]
        assert found["reduce twice"].startswith("RuntimeError: reduce(): expected before reduce()")
        assert found["backward after reduce"].startswith("RuntimeError: backward(): expected before reduce()")
        assert "expected untouched weights" in found["stepping"]
        assert "expected collector.backward(loss), got another backward()" in found["another backward"]
        assert "save_to: expected a name that ends in '.safetensors'" in found["no ending"]


# --- killed -----------------------------------------------------------------------------------------------------------


def collect_with_snapshots(rank: int, world: int, folder: Path, kill_at: int, how: str) -> list[int]:
    """Rank 1 is killed when it has consumed ``kill_at`` micro-batches and not yet written its snapshot."""
    group = None if how == "sharded" else dist.group.WORLD
    net = make_net()
    path = folder / f"{how}.snapshot.safetensors" if group is None else folder / f"{how}.{rank}.safetensors"
    if group is None:
        sharded(net, world)
    collector = GlobalGradientCollector(net, snapshot_path=path, snapshot_every=1)
    start, real = collector.consumed, GradientSums.save

    def save(self: GradientSums, *args: Any) -> None:
        if rank == 1 and self.progress.consumed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *args)

    with mock.patch.object(GradientSums, "save", save), collector:
        for batch in collector.remaining(batches_of(rank)):
            collector.backward(*token_loss(net, batch))
    if group is not None:
        collector.reduce(group)
    gg = collector.finish("int8", save_to=folder / f"{how}.safetensors" if group is None else None)
    if group is not None and rank == 0:
        gg.save(folder / f"{how}.safetensors")
    return start


@pytest.mark.parametrize("how", ["sharded", "whole"])
def test_killed_and_resumed_gives_the_same_bytes(how: str, tmp_path: Path) -> None:
    """Protects the snapshots of ranks: one is killed before its newest, which the other may have written."""
    for folder in ("once", "again"):
        (tmp_path / folder).mkdir()
    run_ranks(collect_with_snapshots, 2, tmp_path / "once", 0, how)
    run_ranks(collect_with_snapshots, 2, tmp_path / "again", 3, how, killed=(1,))
    assert not (tmp_path / "again" / f"{how}.safetensors").exists()
    starts = run_ranks(collect_with_snapshots, 2, tmp_path / "again", 0, how)
    assert starts[1] == 2 and (starts[0] == 2 or how == "whole")
    once, again = ((tmp_path / folder / f"{how}.safetensors").read_bytes() for folder in ("once", "again"))
    assert once == again


def test_the_snapshot_gone_on_from_is_overwritten_last(tmp_path: Path) -> None:
    """Whatever ``snapshot_every`` was before: until a newer one is whole, it is the one that all ranks have."""
    sums, taken = GradientSums({"w": torch.zeros(2)}), []
    here = {"over_mesh_": lambda tensor, smallest: tensor, "together": lambda act: act()}
    sharding = mock.Mock(rows=[(0, 2)], **here)
    sharding.mesh.configure_mock(device_type="cpu", **{"get_coordinate.return_value": [0], "size.return_value": 1})
    for every, until in ((1, 4), (4, 8), (2, 10)):
        snapshots = Snapshots(tmp_path / "s.safetensors", every, {}, sharding)
        snapshots.resume(sums)
        before = sums.progress.consumed
        while sums.progress.consumed < until:
            sums.progress.consumed += 1
            if snapshots.due(sums):
                snapshots.save(sums)
            if sums.progress.consumed == before + every:  # the first that was written
                there = [SavedTensors(file).content for file in snapshots.files if file.exists()]
                taken.append(sorted(content["progress"]["consumed"] for content in there))
    assert taken == [[1], [4, 8], [8, 10]]


def test_ranks_without_a_common_snapshot_say_so(tmp_path: Path) -> None:
    """Protects against sums of different micro-batches: each rank keeps two snapshots, here all but one are lost."""
    run_ranks(collect_with_snapshots, 2, tmp_path, 0, "sharded")
    names = [f"sharded.snapshot.rank{rank}-of-2.{turn}.safetensors" for rank in (0, 1) for turn in "ab"]
    assert sorted(file.name for file in tmp_path.glob("*.rank*")) == names
    (tmp_path / names[0]).unlink()
    (tmp_path / names[3]).unlink()
    with pytest.raises(AssertionError, match=r"expected a snapshot of 4 micro-batches.*got those of \[5\]; delete"):
        run_ranks(collect_with_snapshots, 2, tmp_path, 0, "sharded")

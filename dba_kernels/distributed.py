"""Process-group seams: parameters cut by rows, and everything the library sends between ranks, go through here.

FSDP2 (``fully_shard``) makes every parameter a DTensor: rows of dimension 0 cut over one dimension of a device mesh as
``torch.chunk`` cuts them, so uneven and empty parts occur. The rest of the library works on the local part, knows from
here which rows it is, and gives its own tensors the same layout, which is what checkpoints are resharded by.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types that are no DTensor for certain; the common case costs one look-up."""

LONGEST_MESSAGE = 4000
"""Bytes of an error's message that other ranks are told."""

Result = TypeVar("Result")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` lies on a device mesh."""
    if type(tensor) in PLAIN_TYPES:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor, in the same memory; any other tensor itself."""
    # Not to_local(), which makes a new Parameter of a Parameter's part: as slow as all else that a step does with it.
    part: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return part


def layout_of(tensor: Any) -> str:
    """How ``tensor`` lies on the ranks, comparable and readable."""
    return f"{tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "whole on every rank"


def like(param: Any, part: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``part`` as this rank's rows of a tensor of the (global) ``shape`` that lies on the ranks as ``param`` does.

    The result shares the memory of ``part``; for a plain ``param`` it is ``part``.
    """
    if not is_dtensor(param):
        return part
    stride = torch.empty(shape, device="meta").stride()
    options: dict[str, Any] = dict(run_check=False, shape=torch.Size(shape), stride=stride)
    whole: torch.Tensor = type(param).from_local(part.detach(), param.device_mesh, param.placements, **options)
    return whole


def zeros(param: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the (global) ``shape``, with as many rows as ``param``, which lie on the ranks as its rows do."""
    part = local(param)
    rows = part.shape[:1] if is_dtensor(param) else shape[:1]
    return like(param, torch.zeros((*rows, *shape[1:]), dtype=dtype, device=part.device), shape)


class Sharding:
    """Which rows of every parameter this rank holds, and how to sum over the ranks that hold the others.

    Args:
        named_params: (name, parameter) pairs; the names are for errors and may have wrappers' prefixes.

    Attributes:
        rows: per parameter (start, stop) of dimension 0; None where every rank holds all of it.
        mesh: the device mesh, None if all tensors are plain.
        leads: whether this rank is the one, among those that hold different rows, that counts what all of them hold.

    Raises:
        ValueError: parameters flattened by FSDP1 or DeepSpeed ZeRO, cut otherwise than by rows, offloaded, or on
            several meshes.
    """

    def __init__(self, named_params: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.rows: list[tuple[int, int] | None] = []
        layouts: dict[Any, str] = {}
        meshes: dict[Any, str] = {}
        for name, param in named_params:
            _refuse_flattened(name, param)
            rows, dims = _rows(name, param) if is_dtensor(param) else (None, ())
            self.rows.append(rows)
            if is_dtensor(param):
                meshes.setdefault(param.device_mesh, name)  # type: ignore[attr-defined]
            if dims:
                layouts.setdefault(dims, name)
        for kind in (meshes, layouts):
            if len(kind) > 1:
                first, second = list(kind.values())[:2]
                raise ValueError(
                    f"parameter {second!r}: expected the device mesh and the sharded dimensions of {first!r}, got "
                    "others; make one optimizer per mesh"
                )
        mesh: Any = next(iter(meshes), None)
        self.mesh = mesh
        self._dims = [dim for dim in next(iter(layouts), ()) if mesh.size(dim) > 1]
        self.leads = all(mesh.get_local_rank(dim) == 0 for dim in self._dims)

    @property
    def first(self) -> bool:
        """Whether this is the mesh's first rank: the one that writes."""
        return not any(self.mesh.get_coordinate())

    @property
    def communicates(self) -> bool:
        """Whether some rows are elsewhere."""
        return bool(self._dims)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up, in place, what the ranks have that hold the other rows: one all-reduce per sharded dimension."""
        for dim in self._dims:
            dist.all_reduce(tensor, group=self.mesh.get_group(dim))
        return tensor

    def over_mesh_(self, tensor: torch.Tensor, smallest: bool = False) -> torch.Tensor:
        """Sum (or minimum) in place over all ranks of the mesh; those that hold the same rows (HSDP) count each."""
        op = dist.ReduceOp.MIN if smallest else dist.ReduceOp.SUM
        for dim in range(self.mesh.ndim):
            dist.all_reduce(tensor, op, group=self.mesh.get_group(dim))
        return tensor

    def together(self, act: Callable[[], Result]) -> Result:
        """``act()`` on every rank of the mesh, which all must reach: where it fails on one, no other waits for it.

        Raises:
            Exception: what ``act`` raised here.
            RuntimeError: it failed elsewhere; with that rank's message.
        """
        if self.mesh is None:
            return act()
        return _together(act, self._place(), self.mesh.size(), self.mesh.device_type, self.over_mesh_)

    def _place(self) -> int:
        """This rank's number within the mesh."""
        place = 0
        for dim, at in enumerate(self.mesh.get_coordinate()):
            place = place * int(self.mesh.size(dim)) + int(at)
        return place


def _rows(name: str, param: Any) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """Rows of a DTensor that are here (None: all of them), and the mesh dimensions that it is cut over."""
    mesh, part = param.device_mesh, local(param)
    if part.device.type != mesh.device_type:
        raise ValueError(
            f"parameter {name!r}: expected its part on {mesh.device_type}, where its mesh is, got {part.device}; "
            "leave out CPUOffloadPolicy"
        )
    start, size, dims = 0, param.shape[0] if param.dim() > 0 else 1, []
    for dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        # By name: the strided shards of FSDP over tensor parallelism are a subclass in some releases of torch.
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise ValueError(
                f"parameter {name!r}: expected Replicate() or Shard(0) on every dimension of its mesh, got "
                f"{param.placements}; a global gradient and 8-bit state are cut by rows: use fully_shard without a "
                "shard_placement_fn, alone or with replication (HSDP), not with tensor parallelism"
            )
        chunk = -(-size // mesh.size(dim))  # as torch.chunk
        begin = min(mesh.get_local_rank(dim) * chunk, size)
        start, size = start + begin, min(chunk, size - begin)
        dims.append(dim)
    return ((start, start + size) if dims else None), tuple(dims)


def _refuse_flattened(name: str, param: torch.Tensor) -> None:
    if getattr(param, "_fsdp_flattened", False) or "_fsdp_wrapped_module" in name.split("."):
        kind, fix = "FSDP1", "shard with torch.distributed.fsdp.fully_shard (Accelerate: fsdp_version: 2)"
    elif hasattr(param, "ds_id"):
        kind, fix = "DeepSpeed ZeRO-3", "use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
    else:
        return
    raise ValueError(
        f"parameter {name!r}: expected the model's own tensor or a DTensor, got a part of a tensor that {kind} has "
        f"flattened, in which rows and norms of single parameters are lost; {fix}"
    )


def fsdp_sharding(model: torch.nn.Module) -> Sharding:
    """How the parameters of a model lie on the ranks, for one who reads their gradients.

    Raises:
        ValueError: see :class:`Sharding`; or gradients that are not FSDP2's averages over the ranks.
    """
    named = list(model.named_parameters())
    sharding = Sharding(named)
    if sharding.mesh is None:
        return sharding
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "model: expected DTensors of torch.distributed.fsdp.fully_shard, got others; shard it with that"
        )
    for name, param in named:
        if param.requires_grad and not is_dtensor(param):
            raise ValueError(
                f"parameter {name!r}: expected a DTensor as others are, got a plain tensor, whose gradient FSDP2 does "
                "not average; shard it too, or freeze it"
            )
    return sharding


def gather(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor of ``param``'s shape of which every rank has its ``part``; all ranks of the mesh must call."""
    sharded: Any = like(param, part, tuple(param.shape))
    whole: torch.Tensor = sharded.full_tensor() if is_dtensor(sharded) else sharded
    return whole


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in ``group``; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def same_on_ranks(digest: bytes, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of ``group`` gave the same ``digest``; the answer is the same on all of them."""
    if world_size(group) == 1:
        return True
    numbers = torch.tensor(list(digest), dtype=torch.int64, device=device)
    extremes = torch.stack((numbers, -numbers))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    return bool((extremes[0] == -extremes[1]).all())


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum ``tensor`` over the ranks of ``group`` in place; with one process nothing happens."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def together_in(group: dist.ProcessGroup | None, device: torch.device, act: Callable[[], Result]) -> Result:
    """:meth:`Sharding.together` over a group; None: this process alone."""
    if group is None or world_size(group) == 1:
        return act()

    def over_group_(tensor: torch.Tensor, smallest: bool = False) -> torch.Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MIN if smallest else dist.ReduceOp.SUM, group=group)
        return tensor

    return _together(act, dist.get_rank(group), world_size(group), str(device), over_group_)


def _together(
    act: Callable[[], Result], place: int, size: int, device: str, reduce: Callable[..., torch.Tensor]
) -> Result:
    """``reduce(tensor, smallest)`` sums in place over ``size`` ranks, of which this is number ``place``."""
    failed: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failed = error
    first = int(reduce(torch.tensor(size if failed is None else place, device=device), True))
    if first == size:
        return result
    text = f"{type(failed).__name__}: {failed}".encode()[:LONGEST_MESSAGE] if first == place else b""
    told = torch.tensor([*text, *[0] * (LONGEST_MESSAGE - len(text))], dtype=torch.int64, device=device)
    message = bytes(reduce(told, False).tolist()).rstrip(b"\0").decode(errors="replace")
    raise failed or RuntimeError(f"rank {first} failed, and all end with it: {message}")


def answers_of_ranks(topic: str, answer: str, patience: float) -> dict[int, str]:
    """What each rank of the default group has said on ``topic``, by rank.

    It goes through the group's store: no rank has to take part, as in a collective, and one that does not holds the
    others up for ``patience`` at most.

    Args:
        topic: the same on all ranks for the same question, and used once.
        answer: this rank's.
        patience: seconds to wait for the others; 0: only answer.
    """
    size = world_size()
    if size == 1 or dist.get_backend() == "fake":
        return {0: answer}
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    keys = [f"dba_kernels/{topic}/{other}" for other in range(size)]
    store.set(keys[rank], answer)
    if patience == 0:
        return {rank: answer}
    with contextlib.suppress(RuntimeError):  # those that are there can be compared even so
        store.wait(keys, datetime.timedelta(seconds=patience))
    return {other: store.get(key).decode() for other, key in enumerate(keys) if store.check([key])}

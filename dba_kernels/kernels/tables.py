"""The host's side of every launch: tables of pointers and chunks, and what a launch needs to know of its tensors."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from typing import Any

import torch
import triton.language as tl

from .. import formats
from ..formats import EncodedTensor, matrix_shape
from ..stepdata import TensorBatch
from . import columns as col
from .common import ALIGNMENT, TILE

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

MOST_TILES = 8
"""Tiles of a chunk of a large model: its tables, pointers and coefficients are read once per chunk."""
LEAST_CHUNKS = 2048
"""Programs that a launch has where its model is large enough: about two for each that a large GPU runs at a time."""

_captured: list[torch.Tensor] = []
"""Host buffers whose copy to the device is part of a CUDA graph, which reads them again at every replay."""


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's device, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def vector_elements(*dtypes: torch.dtype) -> int:
    """Elements per access, the same for all tensors of a tile: 16 bytes of the widest, less of the others."""
    return int(ALIGNMENT.value) // max(dtype.itemsize for dtype in dtypes)


def address_of(name: str, tensor: torch.Tensor) -> int:
    """Address of a tensor that a kernel may walk.

    Raises:
        ValueError: it is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous storage, got strides {tensor.stride()}; call .contiguous() first"
        )
    return tensor.data_ptr()


def copy_to(table: torch.Tensor, values: list[Any]) -> torch.Tensor:
    """Fill a device table from a host list, without waiting for the copy."""
    # Pinned memory comes from torch's caching allocator, which reuses it only after this copy has completed.
    host = torch.tensor(values, dtype=table.dtype, pin_memory=table.is_cuda)
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return table.copy_(host, non_blocking=True)


def access(path: str, vector: int) -> dict[str, Any]:
    """Compile-time arguments of one way to read tiles, where ``vector`` elements of the widest tensor are 16 bytes.

    Args:
        path: ``"aligned"``, ``"narrow"`` (full tiles beside a misaligned gradient, which is read element by element)
            or ``"masked"``.
    """
    return {
        "VECTOR": 1 if path == "masked" else vector,
        "GRAD_VECTOR": vector if path == "aligned" else 1,
        "MASKED": path == "masked",
    }


class Addresses:
    """Device table of the addresses of tensors that may move between steps (gradients): copied only when they do."""

    def __init__(self, n: int, device: torch.device):
        self.table = torch.empty(n, dtype=torch.int64, device=device)
        self.known: list[int] = []

    def refresh(self, tensors: list[torch.Tensor]) -> bool:
        """Bring the table to these tensors; whether they moved.

        Raises:
            ValueError: a tensor is not contiguous, or not of the others' dtype.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        moved = addresses != self.known
        if moved:
            for i, tensor in enumerate(tensors):
                address_of(f"grads[{i}]", tensor)
                if tensor.dtype != tensors[0].dtype:
                    raise ValueError(
                        f"grads[{i}]: expected {tensors[0].dtype} like grads[0], got {tensor.dtype}; batch them apart"
                    )
            copy_to(self.table, addresses)
            self.known = addresses
        return moved


class Entry(list[int]):
    """One row of the pointer table, of a tensor whose streams are added one by one.

    Args:
        shape: of the tensor.
        grouped: whether one of the streams is in a grouped format; else its elements are one long row.
    """

    def __init__(self, shape: tuple[int, ...], grouped: bool):
        super().__init__([0] * col.POINTERS.value)
        numel = math.prod(shape)
        rows, cols = matrix_shape(shape) if grouped else (1, numel)
        self[col.ROWS.value], self[col.COLS.value] = rows, cols
        self.full = rows == 1 or cols % formats.GROUP == 0
        self.numel = numel
        self.positions = rows * -(-cols // formats.GROUP) * formats.GROUP if numel else 0

    def stream(self, column: tl.constexpr, address: int) -> None:
        """A tensor that tiles read or write: full ones only where it is aligned."""
        self[column.value] = address
        self.full &= address % ALIGNMENT.value == 0

    def store(self, name: str, stored: EncodedTensor) -> None:
        """A stored tensor: its codes are a stream, its scales are read singly, so of any alignment."""
        self.stream(col.GLOBAL_GRAD, address_of(f"{name}.codes", stored.codes))
        if stored.scales is not None:
            self[col.GLOBAL_SCALE.value] = address_of(f"{name}.scales", stored.scales)

    def spans(self) -> list[tuple[int, int, bool]]:
        """(first tile, end, masked) of runs of tiles that together are the tensor.

        Masked are all tiles of a tensor with padded rows or misaligned storage, what is left after the last full tile,
        and the tile in which the upper 32 bits of the index within the whole parameter change: random numbers are keyed
        by them.
        """
        tiles = -(-self.positions // TILE.value)
        if not self.full:
            return [(0, tiles, True)] if tiles else []
        offset, n_full = self[col.OFFSET.value], self.numel // TILE.value
        boundaries = range(-offset % 2**32, self.numel, 2**32)
        cuts = [at // TILE.value for at in boundaries if at % TILE.value and at // TILE.value < n_full]
        ends = [*cuts, n_full]
        starts = [0, *(cut + 1 for cut in cuts)]
        spans = [(start, end, False) for start, end in zip(starts, ends, strict=True)]
        spans += [(cut, cut + 1, True) for cut in cuts] + [(n_full, tiles, True)]
        return sorted(span for span in spans if span[0] < span[1])


def chunk_tiles(tiles: int) -> int:
    """Tiles per chunk of a launch: few enough for LEAST_CHUNKS programs, at most MOST_TILES."""
    return max(1, min(MOST_TILES, tiles // LEAST_CHUNKS))


def chunk_table(entries: list[Entry]) -> list[tuple[int, int, int, int, bool]]:
    """``(tensor, first tile, tiles, slot, masked)`` of every program; each tile of each tensor in exactly one chunk.

    The cut depends on nothing but shapes, offsets and the storage's alignment, so sums have the same bits on every run.
    """
    spans = [(i, *span) for i, entry in enumerate(entries) for span in entry.spans()]
    length = chunk_tiles(sum(end - first for _, first, end, _ in spans))
    cut = [
        (i, at, min(length, end - at), masked) for i, first, end, masked in spans for at in range(first, end, length)
    ]
    return [(i, at, tiles, slot, masked) for slot, (i, at, tiles, masked) in enumerate(cut)]


class Tables:
    """Pointer and chunk tables of one launch, or of as many as there are ways to access its tiles.

    Args (attributes):
        pointers: int64 ``[n, POINTERS]``.
        n_chunks: of all launches together.
        chunks: of each launch, by its way of access: int32 ``[n, CHUNKS]``.
    """

    def __init__(self, entries: list[Entry], device: torch.device):
        self._chunks = chunk_table(entries)
        self.n_chunks = len(self._chunks)
        per_tensor = Counter(chunk[0] for chunk in self._chunks)
        first_slot = 0
        for i, entry in enumerate(entries):
            entry[col.FIRST_SLOT.value], entry[col.N_SLOTS.value] = first_slot, per_tensor[i]
            first_slot += per_tensor[i]
        pointers = torch.empty(len(entries), col.POINTERS.value, dtype=torch.int64, device=device)
        self.pointers = copy_to(pointers, entries)
        self._full = {tensor for tensor, *_, masked in self._chunks if not masked}
        self._routes: dict[frozenset[int], dict[str, torch.Tensor]] = {}
        self._route(frozenset())

    def _route(self, misaligned: frozenset[int]) -> None:
        """One list of chunks per way of access; ``misaligned`` tensors have a gradient that is.

        All routes are kept: gradients may come back to where they were, and a CUDA graph reads its lists at every
        replay.
        """
        if misaligned not in self._routes:
            by_path = defaultdict(list)
            for tensor, first, tiles, slot, masked in self._chunks:
                path = "masked" if masked else "narrow" if tensor in misaligned else "aligned"
                by_path[path].append((tensor, first, tiles, slot))
            device = self.pointers.device
            self._routes[misaligned] = {
                path: copy_to(torch.empty(len(rows), col.CHUNKS.value, dtype=torch.int32, device=device), rows)
                for path, rows in by_path.items()
            }
        self.chunks = self._routes[misaligned]

    def launches(self, vector: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Of each launch that is needed its chunk table, int32 ``[n, CHUNKS]``, and its compile-time arguments."""
        return [(chunks, access(path, vector)) for path, chunks in self.chunks.items()]


class GradTables(Tables):
    """With what a launch that reads gradients needs beside.

    Args (attributes):
        grads: where this step's gradients are.
        partials: fp32 ``[n_chunks, 2]``, scratch of the reduction.
    """

    def __init__(self, entries: list[Entry], device: torch.device):
        super().__init__(entries, device)
        self.grads = Addresses(len(entries), device)
        self.partials = torch.empty(self.n_chunks, 2, dtype=torch.float32, device=device)

    def refresh(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """The table of these gradients' addresses; launches go where their alignment allows.

        Raises:
            ValueError: as :meth:`Addresses.refresh`.
        """
        if self.grads.refresh(grads):
            self._route(frozenset(i for i in self._full if self.grads.known[i] % ALIGNMENT.value))
        return self.grads.table


def tables_of(batch: TensorBatch) -> GradTables:
    """The batch's tables, built once."""
    if "triton" not in batch.cache:
        stored = formats.STORAGE_FORMATS.get(batch.global_format)
        grouped = formats.STATE_FORMATS[batch.state_format].grouped or (stored is not None and stored.grouped)
        entries = [_batch_entry(batch, i, grouped) for i in range(len(batch.tensors))]
        batch.cache["triton"] = GradTables(entries, batch.device)
    tables: GradTables = batch.cache["triton"]
    return tables


STREAMS = {
    "param": col.PARAM,
    "remainder": col.REMAINDER,
    "exp_avg": col.EXP_AVG,
    "exp_avg_sq": col.EXP_AVG_SQ,
}
SCALES = {"exp_avg_scale": col.EXP_AVG_SCALE, "exp_avg_sq_scale": col.EXP_AVG_SQ_SCALE}


def _batch_entry(batch: TensorBatch, i: int, grouped: bool) -> Entry:
    tensor, name = batch.tensors[i], f"tensors[{i}]"
    entry = Entry(tuple(tensor.param.shape), grouped)
    for part, column in STREAMS.items():
        if (streamed := getattr(tensor, part)) is not None:
            entry.stream(column, address_of(f"{name}.{part}", streamed))
    for part, column in SCALES.items():
        if (scales := getattr(tensor, part)) is not None:
            entry[column.value] = address_of(f"{name}.{part}", scales)
    stored: Any = tensor.global_grad
    if stored is not None:
        if stored.format != batch.global_format:
            raise ValueError(f"{name}.global_grad: expected format {batch.global_format!r}, got {stored.format!r}")
        entry.store(f"{name}.global_grad", stored)
    entry[col.TABLE_ROW.value] = tensor.index
    entry[col.SEED.value] = tensor.seed
    entry[col.OFFSET.value] = tensor.offset
    return entry

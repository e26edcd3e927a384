"""What all kernels share: tables of pointers and chunks on the host, tile addressing on the device.

One launch serves every tensor of a batch. A program takes one chunk of CHUNK positions and walks it in tiles of TILE.
*Positions* number the elements of a tensor whose rows are padded to whole groups, so group ``p // GROUP`` of a grouped
format always is 64 consecutive positions; without padding (full rows, or no grouped format: one long row) position and
element are the same and a tile may be *full*: no masks, 16-byte accesses. All other tiles are *masked*.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl

from .. import formats
from ..formats import TensorBatch, matrix_shape
from . import columns as col

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

GROUP = tl.constexpr(formats.GROUP)
TILE = tl.constexpr(1024)
"""Positions that 128 threads hold in registers: 8 each, two 16-byte loads of fp32 or one of bf16."""
MASKED_TILE = tl.constexpr(1024 if INTERPRETED.value else 256)
"""Positions of a tile with masks: 2 per thread, so that its addresses need no more registers than a full tile. The
interpreter has no registers, and pays per tile."""
CHUNK = tl.constexpr(8 * TILE.value)
"""Positions per program: the tables, pointers and coefficients are read once per chunk."""
THREADS = 128
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)
ALIGNMENT = tl.constexpr(16)
"""Bytes that every address must be a multiple of for full tiles."""

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# --- host -------------------------------------------------------------------------------------------------------------


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's device, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A host list as a device tensor, without waiting for the copy."""
    # Pinned memory comes from torch's caching allocator, which reuses it only after this copy has completed.
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def chunks_in(positions: int) -> int:
    return -(-positions // CHUNK.value)


def chunk_table(positions: list[int]) -> list[tuple[int, int]]:
    """``(tensor, first position / CHUNK)`` of every program; each position of each tensor in exactly one chunk."""
    return [(i, k) for i, n in enumerate(positions) for k in range(chunks_in(n))]


class Addresses:
    """Device table of the addresses of tensors that may move between steps (gradients): copied only when they do."""

    def __init__(self, n: int, device: torch.device):
        self.table = torch.zeros(n, dtype=torch.int64, device=device)
        self._known: list[int] = []
        self._captured: list[torch.Tensor] = []

    def refresh(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The table for these tensors.

        Raises:
            ValueError: a tensor is not contiguous, or not of the others' dtype.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._known:
            for i, tensor in enumerate(tensors):
                check_contiguous(f"grads[{i}]", tensor)
                if tensor.dtype != tensors[0].dtype:
                    raise ValueError(
                        f"grads[{i}]: expected {tensors[0].dtype} like grads[0], got {tensor.dtype}; batch them apart"
                    )
            host = torch.tensor(addresses, dtype=torch.int64, pin_memory=self.table.is_cuda)
            self.table.copy_(host, non_blocking=True)
            if self.table.is_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(host)  # a graph reads it again at every replay
            self._known = addresses
        return self.table


class Tables:
    """Pointer and chunk tables of one batch, built once.

    Args (attributes):
        pointers: int64 ``[n, POINTERS]``.
        chunks: int32 ``[n_chunks, 2]``.
        grads: where this step's gradients are.
        partials: fp32 ``[n_chunks, 2]``, scratch of the reduction.
    """

    def __init__(self, batch: TensorBatch):
        device = batch.params[0].device
        stored = formats.STORAGE_FORMATS.get(batch.global_format)
        grouped = batch.state_format == "int8" or (stored is not None and stored.grouped)
        rows: list[list[int]] = []
        positions: list[int] = []
        first_chunk = 0
        for i, table_row in enumerate(batch.index.tolist()):
            entry, count = _pointer_row(batch, i, grouped)
            entry[col.TABLE_ROW.value] = table_row
            entry[col.FIRST_CHUNK.value], entry[col.N_CHUNKS.value] = first_chunk, chunks_in(count)
            first_chunk += chunks_in(count)
            rows.append(entry)
            positions.append(count)
        chunks = chunk_table(positions)
        self.n_chunks = len(chunks)
        self.pointers = to_device(rows, torch.int64, device)
        self.chunks = to_device(chunks or [(0, 0)], torch.int32, device)
        self.grads = Addresses(len(rows), device)
        self.partials = torch.empty(max(len(chunks), 1), 2, dtype=torch.float32, device=device)


def tables_of(batch: TensorBatch) -> Tables:
    """The batch's tables, from its cache."""
    if "triton" not in batch.cache:
        batch.cache["triton"] = Tables(batch)
    return batch.cache["triton"]


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous storage, got strides {tensor.stride()}; call .contiguous() first"
        )


STREAMS = {
    "params": col.PARAM,
    "remainders": col.REMAINDER,
    "exp_avgs": col.EXP_AVG,
    "exp_avg_sqs": col.EXP_AVG_SQ,
}
SCALES = {"exp_avg_scales": col.EXP_AVG_SCALE, "exp_avg_sq_scales": col.EXP_AVG_SQ_SCALE}


def _pointer_row(batch: TensorBatch, i: int, grouped: bool) -> tuple[list[int], int]:
    """One row of the pointer table, and the number of positions of its tensor."""
    entry = [0] * col.POINTERS.value

    def point(column: tl.constexpr, name: str, tensor: torch.Tensor) -> None:
        check_contiguous(name, tensor)
        entry[column.value] = tensor.data_ptr()

    for name, column in (STREAMS | SCALES).items():
        if getattr(batch, name):
            point(column, f"{name}[{i}]", getattr(batch, name)[i])
    if batch.global_grads:
        stored: Any = batch.global_grads[i]
        if stored.format != batch.global_format:
            raise ValueError(f"global_grads[{i}]: expected format {batch.global_format!r}, got {stored.format!r}")
        point(col.GLOBAL_GRAD, f"global_grads[{i}].codes", stored.codes)
        if stored.scales is not None:
            point(col.GLOBAL_SCALE, f"global_grads[{i}].scales", stored.scales)
    numel = batch.params[i].numel()
    rows, cols = matrix_shape(tuple(batch.params[i].shape)) if grouped else (1, numel)
    entry[col.ROWS.value], entry[col.COLS.value] = rows, cols
    whole_groups = rows == 1 or cols % formats.GROUP == 0
    streams = [entry[column.value] for column in (*STREAMS.values(), col.GLOBAL_GRAD)]
    entry[col.FULL_TILES.value] = int(whole_groups and all(p % ALIGNMENT.value == 0 for p in streams))
    entry[col.SEED.value] = batch.seeds[i] if batch.seeds else 0
    entry[col.OFFSET.value] = batch.offsets[i] if batch.offsets else 0
    return entry, rows * -(-cols // formats.GROUP) * formats.GROUP if numel else 0


def vector_elements(*dtypes: torch.dtype) -> int:
    """Elements per access, the same for all tensors of a tile: 16 bytes of the widest, less of the others."""
    return ALIGNMENT.value // max(dtype.itemsize for dtype in dtypes)


# --- device -----------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(pointers, column, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The tensor in this column. On full tiles VECTOR elements of it are aligned: one vector access per thread."""
    address = tl.load(pointers + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def chunk_ranges(chunk, pointers, grad_address, rows, cols):
    """(first position, end of the full tiles, end) of a chunk; masked tiles take what full ones leave."""
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    end = tl.minimum(first + CHUNK, rows * tl.cdiv(cols, GROUP) * GROUP)
    aligned = (tl.load(pointers + col.FULL_TILES) != 0) & (tl.load(grad_address) % ALIGNMENT == 0)
    full = (tl.minimum(end, rows * cols) - first) // TILE * TILE
    return first, first + tl.where(aligned, full, 0), end


@triton.jit
def tile_offsets(start, rows, cols, LANES: tl.constexpr, MASKED: tl.constexpr, COPIES: tl.constexpr = 1):
    """Where the tile that begins at position ``start`` lies in a tensor that stores LANES items per group.

    LANES is GROUP for tensors of elements and GROUP / 2 for packed int4; ``cols`` counts items per row. Each item is
    named COPIES times, side by side.

    Returns:
        (offset of the first item, offsets relative to it ``[groups, LANES · COPIES]``, mask of the same shape)
    """
    group = tl.arange(0, (MASKED_TILE if MASKED else TILE) // GROUP)[:, None]
    lane = tl.arange(0, LANES * COPIES)[None, :] // COPIES
    if MASKED:
        groups_per_row = tl.maximum(tl.cdiv(cols, LANES), 1)
        first_group = start // GROUP
        row = first_group // groups_per_row
        column = (first_group - row * groups_per_row) * LANES
        # From the first item on, 32 bits do: a tile that reaches a further row is near the end of the first one, and
        # a row that it passes whole is short.
        rest = tl.minimum(cols - column, TILE).to(tl.int32)  # items left in the first row
        length = tl.minimum(cols, TILE).to(tl.int32)  # items of a further row
        further = group - tl.cdiv(rest, LANES)  # [groups, 1], counted from the second row
        in_first = further < 0
        passed = further // tl.cdiv(length, LANES)  # rows between the first and this one
        item = tl.where(in_first, group, further - passed * tl.cdiv(length, LANES)) * LANES + lane
        rows_left = tl.minimum(rows - row, TILE).to(tl.int32)
        inside = (item < tl.where(in_first, rest, length)) & (in_first | (passed + 1 < rows_left))
        return row * cols + column, tl.where(in_first, 0, rest + passed * length) + item, inside
    else:
        return start // GROUP * LANES, group * LANES + lane, None


@triton.jit
def group_offsets(start, rows, cols, MASKED: tl.constexpr):
    """Like :func:`tile_offsets`, for the scales: one per group, ``[groups, 1]``."""
    group = tl.arange(0, (MASKED_TILE if MASKED else TILE) // GROUP)[:, None]
    if MASKED:
        return start // GROUP, group, start // GROUP + group < rows * tl.cdiv(cols, GROUP)
    else:
        return start // GROUP, group, None


@triton.jit
def load(pointer, at, MASKED: tl.constexpr):
    """The tile at the offsets ``at``; 0 outside the tensor."""
    first, offsets, inside = at
    if MASKED:
        return tl.load(pointer + first + offsets, mask=inside, other=0)
    else:
        return tl.load(pointer + first + offsets)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """``value`` in ``dtype``; floats round to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and value.dtype == tl.float32:  # where the interpreter would truncate
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def store(pointer, at, value, MASKED: tl.constexpr):
    first, offsets, inside = at
    value = narrow(value, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + first + offsets, value, mask=inside)
    else:
        tl.store(pointer + first + offsets, value)

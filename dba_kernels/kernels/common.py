"""What all kernels share on the device: sizes, tile addressing, loads and stores.

One launch serves every tensor of a batch. A program takes one chunk of CHUNK positions and walks it in tiles of TILE.
*Positions* number the elements of a tensor whose rows are padded to whole groups, so group ``p // GROUP`` of a grouped
format always is 64 consecutive positions; without padding (full rows, or no grouped format: one long row) position and
element are the same and a tile may be *full*: no masks, 16-byte accesses. All other tiles are *masked*.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from .. import formats
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


@triton.jit
def pointer(pointers, column, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The tensor in this column. On full tiles VECTOR elements of it are aligned: one vector access per thread."""
    address = tl.load(pointers + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def chunk_ranges(chunk, pointers, grad_address, rows, cols):
    """(first position, end of the full tiles, end) of a chunk; masked tiles take what full ones leave.

    They also take a chunk that straddles a multiple of 2³² of the whole parameter, as a row shard's may.
    """
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    end = tl.minimum(first + CHUNK, rows * tl.cdiv(cols, GROUP) * GROUP)
    aligned = (tl.load(pointers + col.FULL_TILES) != 0) & (tl.load(grad_address) % ALIGNMENT == 0)
    element = tl.load(pointers + col.OFFSET) + first
    within = ((element ^ (element + CHUNK - 1)) >> 32) == 0
    full = (tl.minimum(end, rows * cols) - first) // TILE * TILE
    return first, first + tl.where(aligned & within, full, 0), end


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
        return start // GROUP * LANES, group * LANES + lane, group >= 0  # no mask is read; Triton 3.6 returns no None


@triton.jit
def group_offsets(start, rows, cols, MASKED: tl.constexpr):
    """Like :func:`tile_offsets`, for the scales: one per group, ``[groups, 1]``."""
    group = tl.arange(0, (MASKED_TILE if MASKED else TILE) // GROUP)[:, None]
    if MASKED:
        return start // GROUP, group, start // GROUP + group < rows * tl.cdiv(cols, GROUP)
    else:
        return start // GROUP, group, group >= 0


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
        rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
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

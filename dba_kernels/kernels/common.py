"""What all kernels share on the device: sizes, tile addressing, loads and stores.

One launch serves every tensor of a batch. A program takes one chunk, a few tiles of TILE positions.
*Positions* number the elements of a tensor whose rows are padded to whole groups, so group ``p // GROUP`` of a grouped
format always is 64 consecutive positions; without padding (full rows, or no grouped format: one long row) position and
element are the same and a tile may be *full*: no masks, 16-byte accesses. All other tiles are *masked*, and have a
launch of their own (:func:`.tables.Tables.launches`), so that their addresses take no registers from full ones.
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
THREADS = 128
WARP = 64 if torch.version.hip else 32
LAUNCH = {"num_warps": THREADS // WARP, "enable_fp_fusion": True}
"""Options of every launch. Fused multiply-adds are stated because the compiler's default may change."""
ALIGNMENT = tl.constexpr(16)
"""Bytes that the addresses of full tiles are multiples of; those of gradients need not be (:class:`.tables.Kind`)."""


@triton.jit
def pointer(pointers, column, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The tensor in this column. VECTOR elements of it are aligned, and on full tiles one access of a thread."""
    address = tl.load(pointers + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def chunk_range(chunk, rows, cols, MASKED: tl.constexpr):
    """(first position, end) of a chunk; full ones are whole tiles."""
    first = tl.load(chunk + col.CHUNK_FIRST).to(tl.int64) * TILE
    end = first + tl.load(chunk + col.CHUNK_TILES).to(tl.int64) * TILE
    if MASKED:
        end = tl.minimum(end, rows * tl.cdiv(cols, GROUP) * GROUP)
    return first, end


@triton.constexpr_function
def tile_of(MASKED):
    """Positions of a tile."""
    return MASKED_TILE.value if MASKED else TILE.value


@triton.jit
def tile_offsets(start, rows, cols, LANES: tl.constexpr, MASKED: tl.constexpr, COPIES: tl.constexpr = 1):
    """Where the tile that begins at position ``start`` lies in a tensor that stores LANES items per group.

    LANES is GROUP for tensors of elements and GROUP / 2 for packed int4; ``cols`` counts items per row. Each item is
    named COPIES times, side by side.

    Returns:
        (offset of the first item, offsets relative to it ``[groups, LANES · COPIES]``, mask of the same shape)
    """
    group = tl.arange(0, tile_of(MASKED) // GROUP)[:, None]
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
    group = tl.arange(0, tile_of(MASKED) // GROUP)[:, None]
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


@triton.jit
def store_scale(pointer, start, rows, cols, scale, VECTOR: tl.constexpr, MASKED: tl.constexpr):
    """One value per group, ``[groups, 1]``, written by the first of the threads that share the group.

    An address for each of these threads gives the store the layout that the values already have. For ``[groups, 1]``
    the compiler would choose another, and the way there leads through shared memory and two barriers; and it would
    number the threads group by group if it were not told to look along the group.
    """
    first, group, inside = group_offsets(start, rows, cols, MASKED)
    THREADS_OF_GROUP: tl.constexpr = GROUP // VECTOR
    thread = tl.arange(0, THREADS_OF_GROUP)[None, :]
    offsets = tl.max_contiguous(group + thread, (1, THREADS_OF_GROUP))
    inside = inside & (thread == 0)
    tl.store(pointer + first + offsets, tl.broadcast_to(scale, inside.shape), mask=inside)

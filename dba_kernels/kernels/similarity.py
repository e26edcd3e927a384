"""The read-only reduction before an update, inner product and norms (inputs of eq. 4).

Bytes per parameter with bf16 gradients: 3 with int8 ĝ_G, 2.5 with int4, 2 without (clipping alone); scales add
4 / GROUP. Sums are taken in a fixed order: per chunk in fp32, over the chunks of a tensor in float64, without atomics.
A tensor's gradient with a norm of 1e18 or more counts as non-finite: beyond, its squares leave fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import formats
from ..stepdata import TensorBatch
from . import columns as col
from .codecs import load_global, stored_dtype
from .common import (
    GROUP,
    LAUNCH,
    chunk_range,
    load,
    pointer,
    tile_of,
    tile_offsets,
)
from .tables import TRITON_DTYPES, on_device, tables_of, vector_elements

SUM_BLOCK = tl.constexpr(1024)
SQUARED_NORM_LIMIT = tl.constexpr(formats.SQUARED_NORM_LIMIT)


@triton.jit
def load_pair(grad_ptr, global_ptr, scale_ptr, start, rows, cols, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """(g_D, ĝ_G) of a tile in fp32; ĝ_G is 0 without one."""
    at = tile_offsets(start, rows, cols, GROUP, MASKED)
    grad = load(grad_ptr, at, MASKED).to(tl.float32)
    if FORMAT == "none":
        return grad, tl.zeros_like(grad)
    else:
        return grad, load_global(global_ptr, scale_ptr, 1.0, start, rows, cols, at, FORMAT, MASKED)


@triton.jit
def reduce_kernel(
    partials_ptr,
    pointers_ptr,
    grads_ptr,
    chunks_ptr,
    GRAD_DTYPE: tl.constexpr,
    GLOBAL_FORMAT: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² of one chunk."""
    chunk = chunks_ptr + col.CHUNKS * tl.program_id(0)
    tensor = tl.load(chunk + col.CHUNK_TENSOR).to(tl.int64)
    pointers = pointers_ptr + tensor * col.POINTERS
    rows = tl.load(pointers + col.ROWS)
    cols = tl.load(pointers + col.COLS)
    STORED: tl.constexpr = "fp32" if GLOBAL_FORMAT == "none" else GLOBAL_FORMAT
    STORED_VECTOR: tl.constexpr = (VECTOR + 1) // 2 if STORED == "int4" else VECTOR
    global_ptr = pointer(pointers, col.GLOBAL_GRAD, stored_dtype(STORED), STORED_VECTOR)
    scale_ptr = pointer(pointers, col.GLOBAL_SCALE, tl.float32, 1)
    grad_ptr = pointer(grads_ptr, tensor, GRAD_DTYPE, GRAD_VECTOR)
    dot = tl.zeros((tile_of(MASKED) // GROUP, GROUP), tl.float32)
    square = tl.zeros((tile_of(MASKED) // GROUP, GROUP), tl.float32)
    first, end = chunk_range(chunk, rows, cols, MASKED)
    for start in range(first, end, tile_of(MASKED)):
        grad, stored = load_pair(grad_ptr, global_ptr, scale_ptr, start, rows, cols, GLOBAL_FORMAT, MASKED)
        if GLOBAL_FORMAT != "none":
            dot += grad * stored
        square += grad * grad
    partial = partials_ptr + 2 * tl.load(chunk + col.CHUNK_SLOT)
    tl.store(partial, tl.sum(dot))
    tl.store(partial + 1, tl.sum(square))


@triton.jit
def finish_kernel(sums_ptr, partials_ptr, pointers_ptr, WIDTH: tl.constexpr):
    """Sum the chunks of one tensor, in float64, into its row of ``[n, WIDTH]``: (dot, square), or the square
    alone, which then is infinite where it must not be used."""
    pointers = pointers_ptr + tl.program_id(0).to(tl.int64) * col.POINTERS
    n_chunks = tl.load(pointers + col.N_SLOTS)
    partials = partials_ptr + tl.load(pointers + col.FIRST_SLOT) * 2
    dot = tl.zeros((SUM_BLOCK,), tl.float64)
    square = tl.zeros((SUM_BLOCK,), tl.float64)
    for first in range(0, n_chunks, SUM_BLOCK):
        chunk = first + tl.arange(0, SUM_BLOCK)
        square += tl.load(partials + 2 * chunk + 1, mask=chunk < n_chunks, other=0).to(tl.float64)
        dot += tl.load(partials + 2 * chunk, mask=chunk < n_chunks, other=0).to(tl.float64)
    row = sums_ptr + tl.load(pointers + col.TABLE_ROW) * WIDTH
    total = tl.sum(square)
    if WIDTH == 2:
        tl.store(row, tl.sum(dot))
    else:
        total = tl.where(total <= SQUARED_NORM_LIMIT, total, float("inf"))
    tl.store(row + WIDTH - 1, total)


@torch.no_grad()
def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    """Write ⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch to its rows of ``sums`` (float64 ``[n_params, 2]``).

    The gradients are taken as they are: not unscaled, not clipped, not negated. A NaN or an infinity in a gradient
    makes its ‖g_D‖² non-finite.

    Raises:
        ValueError: storage that is not contiguous, or gradients of several dtypes.
    """
    if not grads:
        return
    tables = tables_of(batch)
    stored: Any = batch.tensors[0].global_grad
    codes = [] if stored is None else [stored.codes.dtype]
    with on_device(sums):
        where = tables.refresh(grads)
        for chunks, access in tables.launches(vector_elements(grads[0].dtype, *codes)):
            reduce_kernel[(len(chunks),)](
                tables.partials,
                tables.pointers,
                where,
                chunks,
                TRITON_DTYPES[grads[0].dtype],
                batch.global_format,
                **access,
                **LAUNCH,
            )
        finish_kernel[(len(grads),)](sums, tables.partials, tables.pointers, 2, **LAUNCH)

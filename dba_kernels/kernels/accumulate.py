"""Stage 1, the global gradient: fp32 sums over the general data (eq. 1's sum), all tensors in three launches.

Bytes per parameter with bf16 gradients: 12. A non-finite gradient must add nothing, so its norm comes before the sum:
2 to read it, then 2 + 4 + 4. A gradient with a norm of 1e18 or more counts as non-finite.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import columns as col
from .common import GROUP, MASKED_TILE, NUM_WARPS, TILE, chunk_ranges, load, pointer, store, tile_offsets
from .similarity import finish_kernel, reduce_kernel
from .tables import TRITON_DTYPES, Entry, GradTables, address_of, on_device, vector_elements


@triton.jit
def add_tile(total_ptr, grad_ptr, weight, start, numel, MASKED: tl.constexpr):
    at = tile_offsets(start, 1, numel, GROUP, MASKED)
    grad = load(grad_ptr, at, MASKED).to(tl.float32)
    store(total_ptr, at, load(total_ptr, at, MASKED) + weight * grad, MASKED)


@triton.jit
def add_kernel(
    pointers_ptr, grads_ptr, chunks_ptr, squared_norms_ptr, weight, GRAD_DTYPE: tl.constexpr, VECTOR: tl.constexpr
):
    """total ← total + weight · grad for one chunk, where the gradient is finite."""
    chunk = chunks_ptr + 2 * tl.program_id(0)
    tensor = tl.load(chunk).to(tl.int64)
    squared_norm = tl.load(squared_norms_ptr + tensor)
    if not (squared_norm < float("inf")):
        return
    pointers = pointers_ptr + tensor * col.POINTERS
    numel = tl.load(pointers + col.COLS)
    total_ptr = pointer(pointers, col.PARAM, tl.float32, VECTOR)
    grad_ptr = pointer(grads_ptr, tensor, GRAD_DTYPE, VECTOR)
    first, full_end, end = chunk_ranges(chunk, pointers, grads_ptr + tensor, 1, numel)
    for start in range(first, full_end, TILE):
        add_tile(total_ptr, grad_ptr, weight, start, numel, False)
    for start in range(full_end, end, MASKED_TILE):
        add_tile(total_ptr, grad_ptr, weight, start, numel, True)


@functools.lru_cache(maxsize=1024)  # a collector's hooks come with one sum each, again and again
def _tables(addresses: tuple[int, ...], numels: tuple[int, ...], device: torch.device) -> GradTables:
    """Tables of one list of sums; gradients come and go."""
    entries = [Entry((numel,), grouped=False) for numel in numels]
    for i, (entry, address) in enumerate(zip(entries, addresses, strict=True)):
        entry.stream(col.PARAM, address)
        entry[col.TABLE_ROW.value] = i
    return GradTables(entries, device)


@torch.no_grad()
def accumulate(
    totals: list[torch.Tensor], grads: list[torch.Tensor], weight: float, squared_norms: torch.Tensor
) -> None:
    """``total ← total + weight · grad`` for every tensor; ‖grad‖² of each into ``squared_norms`` (float64 ``[n]``).

    A non-finite gradient adds nothing, whole tensor; its norm is then infinite.

    Args:
        totals: fp32 running sums, contiguous.
        grads: fp32, bf16 or fp16 gradients of one micro-batch, contiguous, all of one dtype.
        weight: weight of the micro-batch (1, or its number of target tokens).

    Raises:
        ValueError: storage that is not contiguous, or gradients of several dtypes.
    """
    if not totals:
        return
    addresses = tuple(address_of(f"totals[{i}]", total) for i, total in enumerate(totals))
    tables = _tables(addresses, tuple(total.numel() for total in totals), totals[0].device)
    dtype = TRITON_DTYPES[grads[0].dtype]
    with on_device(totals[0]):
        where = tables.grads.refresh(grads)
        grid = (tables.n_chunks,)
        if tables.n_chunks:
            vector = vector_elements(grads[0].dtype)
            reduce_kernel[grid](
                tables.partials, tables.pointers, where, tables.chunks, dtype, "none", vector, num_warps=NUM_WARPS
            )
        finish_kernel[(len(totals),)](squared_norms, tables.partials, tables.pointers, 1, num_warps=NUM_WARPS)
        if tables.n_chunks:
            vector = vector_elements(grads[0].dtype, torch.float32)
            add_kernel[grid](
                tables.pointers, where, tables.chunks, squared_norms, float(weight), dtype, vector, num_warps=NUM_WARPS
            )

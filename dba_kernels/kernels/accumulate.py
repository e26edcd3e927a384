"""Stage 1, the global gradient: fp32 sums over the general data (eq. 1's sum), all tensors in three launches.

Bytes per parameter with bf16 gradients: 12. A non-finite gradient must add nothing, so its norm comes before the sum:
2 to read it, then 2 + 4 + 4. A gradient with a norm of 1e18 or more counts as non-finite.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import columns as col
from .common import GROUP, LAUNCH, chunk_range, load, pointer, store, tile_of, tile_offsets
from .similarity import finish_kernel, reduce_kernel
from .tables import TRITON_DTYPES, Entry, GradTables, address_of, on_device, vector_elements


@triton.jit
def add_tile(total_ptr, grad_ptr, weight, start, numel, MASKED: tl.constexpr):
    at = tile_offsets(start, 1, numel, GROUP, MASKED)
    grad = load(grad_ptr, at, MASKED).to(tl.float32)
    store(total_ptr, at, load(total_ptr, at, MASKED) + weight * grad, MASKED)


@triton.jit
def add_kernel(
    pointers_ptr,
    grads_ptr,
    chunks_ptr,
    squared_norms_ptr,
    weight,
    GRAD_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """total ← total + weight · grad for one chunk, where the gradient is finite."""
    chunk = chunks_ptr + col.CHUNKS * tl.program_id(0)
    tensor = tl.load(chunk + col.CHUNK_TENSOR).to(tl.int64)
    squared_norm = tl.load(squared_norms_ptr + tensor)
    if not (squared_norm < float("inf")):
        return
    pointers = pointers_ptr + tensor * col.POINTERS
    numel = tl.load(pointers + col.COLS)
    total_ptr = pointer(pointers, col.PARAM, tl.float32, VECTOR)
    grad_ptr = pointer(grads_ptr, tensor, GRAD_DTYPE, GRAD_VECTOR)
    first, end = chunk_range(chunk, 1, numel, MASKED)
    for start in range(first, end, tile_of(MASKED)):
        add_tile(total_ptr, grad_ptr, weight, start, numel, MASKED)


def _tables_of(totals: list[torch.Tensor], cache: dict[str, Any]) -> GradTables:
    """Tables of one list of sums, made anew only where they moved; gradients come and go."""
    device = totals[0].device
    addresses = [address_of(f"totals[{i}]", total, device) for i, total in enumerate(totals)]
    known = cache.get("triton")
    if known is None or known[0] != addresses:
        entries = [Entry((total.numel(),), grouped=False) for total in totals]
        for i, (entry, address) in enumerate(zip(entries, addresses, strict=True)):
            entry.stream(col.PARAM, address)
            entry[col.TABLE_ROW.value] = i
        known = cache["triton"] = addresses, GradTables(entries, device)
    return known[1]


@torch.no_grad()
def accumulate(
    totals: list[torch.Tensor],
    grads: list[torch.Tensor],
    weight: float,
    squared_norms: torch.Tensor,
    cache: dict[str, Any] | None = None,
) -> None:
    """``total ← total + weight · grad`` for every tensor; ‖grad‖² of each into ``squared_norms`` (float64 ``[n]``).

    A non-finite gradient adds nothing, whole tensor; its norm is then infinite.

    Args:
        totals: fp32 running sums, contiguous.
        grads: fp32, bf16 or fp16 gradients of one micro-batch, contiguous, all of one dtype.
        weight: weight of the micro-batch (1, or its number of target tokens).
        cache: keeps the tables of these sums; without one they are made at every call.

    Raises:
        ValueError: storage that is not contiguous, or gradients of several dtypes.
    """
    if not totals:
        return
    tables = _tables_of(totals, {} if cache is None else cache)
    dtype = TRITON_DTYPES[grads[0].dtype]
    with on_device(totals[0]):
        where = tables.refresh(grads)
        for chunks, access in tables.launches(vector_elements(grads[0].dtype)):
            reduce_kernel[(len(chunks),)](
                tables.partials, tables.pointers, where, chunks, dtype, "none", **access, **LAUNCH
            )
        finish_kernel[(len(totals),)](squared_norms, tables.partials, tables.pointers, 1, **LAUNCH)
        for chunks, access in tables.launches(vector_elements(grads[0].dtype, torch.float32)):
            add_kernel[(len(chunks),)](
                tables.pointers, where, chunks, squared_norms, float(weight), dtype, **access, **LAUNCH
            )

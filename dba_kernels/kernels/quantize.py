"""Codecs of whole tensors: encode and decode the stored global gradient, one pass each.

Layouts are those of :mod:`dba_kernels.formats`; the arithmetic is in :mod:`.codecs`, where the step and the
similarity find it too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import GROUP as GROUP_SIZE
from ..formats import EncodedTensor, matrix_shape, scales_shape, storage_format
from .codecs import encode_int4, load_global, narrow_fp8_e4m3, narrow_signed_root, scale_and_inverse
from .common import (
    ALIGNMENT,
    GROUP,
    MASKED_TILE,
    NUM_WARPS,
    TILE,
    group_offsets,
    load,
    on_device,
    store,
    tile_offsets,
    vector_elements,
)


@triton.jit
def aligned(pointer, VECTOR: tl.constexpr):
    """Promise that VECTOR elements are aligned; kept only where full tiles are allowed."""
    return tl.multiple_of(pointer, VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def encode_tile(
    codes_ptr, scales_ptr, tensor_ptr, start, rows, cols, FORMAT: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr
):
    value = load(tensor_ptr, tile_offsets(start, rows, cols, GROUP, MASKED), MASKED).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(tl.abs(value), axis=1, keep_dims=True), STEP)
    store(scales_ptr, group_offsets(start, rows, cols, MASKED), scale, MASKED)
    scaled = value * inverse
    if FORMAT == "int4":
        packed = encode_int4(scaled)
        store(codes_ptr, tile_offsets(start, rows, (cols + 1) // 2, GROUP // 2, MASKED), packed, MASKED)
    else:
        codes = narrow_signed_root(scaled) if FORMAT == "int8" else narrow_fp8_e4m3(scaled)
        store(codes_ptr, tile_offsets(start, rows, cols, GROUP, MASKED), codes, MASKED)


@triton.jit(do_not_specialize=["rows", "cols", "full_tiles"])
def encode_kernel(
    codes_ptr,
    scales_ptr,
    tensor_ptr,
    rows,
    cols,
    full_tiles,
    FORMAT: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of a tensor into a grouped format."""
    codes_ptr = aligned(codes_ptr, VECTOR // 2 if FORMAT == "int4" else VECTOR)
    tensor_ptr = aligned(tensor_ptr, VECTOR)
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * TILE
    positions = rows * tl.cdiv(cols, GROUP) * GROUP
    if (full_tiles != 0) & (start + TILE <= rows * cols):
        encode_tile(codes_ptr, scales_ptr, tensor_ptr, start, rows, cols, FORMAT, STEP, False)
    else:
        for part in range(start, tl.minimum(start + TILE, positions), MASKED_TILE):
            encode_tile(codes_ptr, scales_ptr, tensor_ptr, part, rows, cols, FORMAT, STEP, True)


@triton.jit
def decode_tile(out_ptr, codes_ptr, scales_ptr, start, rows, cols, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    at = tile_offsets(start, rows, cols, GROUP, MASKED)
    store(out_ptr, at, load_global(codes_ptr, scales_ptr, 1.0, start, rows, cols, at, FORMAT, MASKED), MASKED)


@triton.jit(do_not_specialize=["rows", "cols", "full_tiles"])
def decode_kernel(out_ptr, codes_ptr, scales_ptr, rows, cols, full_tiles, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """One tile of a grouped format into a float tensor."""
    codes_ptr = aligned(codes_ptr, VECTOR // 2 if FORMAT == "int4" else VECTOR)
    out_ptr = aligned(out_ptr, VECTOR)
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * TILE
    positions = rows * tl.cdiv(cols, GROUP) * GROUP
    if (full_tiles != 0) & (start + TILE <= rows * cols):
        decode_tile(out_ptr, codes_ptr, scales_ptr, start, rows, cols, FORMAT, False)
    else:
        for part in range(start, tl.minimum(start + TILE, positions), MASKED_TILE):
            decode_tile(out_ptr, codes_ptr, scales_ptr, part, rows, cols, FORMAT, True)


def _geometry(shape: tuple[int, ...], *tensors: torch.Tensor) -> tuple[int, int, int, tuple[int]]:
    """rows, cols, whether full tiles are allowed, and the grid over padded positions."""
    rows, cols = matrix_shape(shape)
    whole_groups = rows == 1 or cols % GROUP_SIZE == 0
    full_tiles = whole_groups and all(tensor.data_ptr() % ALIGNMENT.value == 0 for tensor in tensors)
    positions = rows * -(-cols // GROUP_SIZE) * GROUP_SIZE
    return rows, cols, int(full_tiles), (-(-positions // TILE.value),)


@torch.no_grad()
def encode(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """Encode a dense, finite tensor; error bounds as in the reference.

    Args:
        tensor: fp32, bf16 or fp16, any shape. 1-D and small tensors are stored as fp32 whatever ``format`` says.
        format: a name in ``STORAGE_FORMATS``.
    """
    shape = tuple(tensor.shape)
    chosen = storage_format(format, shape)
    if not chosen.grouped:
        return EncodedTensor(chosen.name, shape, tensor.detach().to(chosen.dtype, copy=True).contiguous())
    tensor = tensor.detach().contiguous()
    codes = torch.empty(chosen.codes_shape(shape), dtype=chosen.dtype, device=tensor.device)
    scales = torch.empty(scales_shape(shape), dtype=torch.float32, device=tensor.device)
    rows, cols, full_tiles, grid = _geometry(shape, tensor, codes)
    with on_device(tensor):
        encode_kernel[grid](
            codes,
            scales,
            tensor,
            rows,
            cols,
            full_tiles,
            FORMAT=chosen.name,
            STEP=1.0 / chosen.code_max**chosen.power,
            VECTOR=vector_elements(tensor.dtype, codes.dtype),
            num_warps=NUM_WARPS,
        )
    return EncodedTensor(chosen.name, shape, codes, scales)


@torch.no_grad()
def decode(encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that is stored, in fp32, or written to ``out`` (fp32, bf16 or fp16, contiguous, same shape)."""
    if out is None:
        out = torch.empty(encoded.shape, dtype=torch.float32, device=encoded.device)
    if encoded.scales is None:
        return out.copy_(encoded.codes)
    codes, scales = encoded.codes.contiguous(), encoded.scales.contiguous()
    rows, cols, full_tiles, grid = _geometry(encoded.shape, out, codes)
    if grid[0]:
        with on_device(out):
            decode_kernel[grid](
                out,
                codes,
                scales,
                rows,
                cols,
                full_tiles,
                FORMAT=encoded.format,
                VECTOR=vector_elements(out.dtype, codes.dtype),
                num_warps=NUM_WARPS,
            )
    return out

"""Codecs of whole tensors: encode and decode the stored global gradient, one pass and one launch for all tensors.

Layouts are those of :mod:`dba_kernels.formats`; the arithmetic is in :mod:`.codecs`, where the step and the
similarity find it too. Bytes per element from or to fp32: int8 5, int4 4.5, bf16 6; scales add 4 / GROUP.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import STORAGE_FORMATS, EncodedTensor, scales_shape, storage_format
from . import columns as col
from .codecs import encode_int4, load_global, narrow, scale_and_inverse, stored_dtype
from .common import (
    GROUP,
    LAUNCH,
    chunk_range,
    load,
    pointer,
    store,
    store_scale,
    tile_of,
    tile_offsets,
)
from .tables import TRITON_DTYPES, Entry, Tables, address_of, on_device, vector_elements


@triton.jit
def encode_tile(
    tensors, start, rows, cols, FORMAT: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr
):
    dense_ptr, codes_ptr, scales_ptr = tensors
    at = tile_offsets(start, rows, cols, GROUP, MASKED)
    value = load(dense_ptr, at, MASKED).to(tl.float32)
    if STEP is None:
        store(codes_ptr, at, value, MASKED)
    else:
        scale, inverse = scale_and_inverse(tl.max(tl.abs(value), axis=1, keep_dims=True), STEP)
        store_scale(scales_ptr, start, rows, cols, scale, VECTOR, MASKED)
        scaled = value * inverse
        if FORMAT == "int4":
            packed_at = tile_offsets(start, rows, (cols + 1) // 2, GROUP // 2, MASKED)
            store(codes_ptr, packed_at, encode_int4(scaled), MASKED)
        else:
            store(codes_ptr, at, narrow(scaled, FORMAT), MASKED)


@triton.jit
def decode_tile(tensors, start, rows, cols, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    dense_ptr, codes_ptr, scales_ptr = tensors
    at = tile_offsets(start, rows, cols, GROUP, MASKED)
    store(dense_ptr, at, load_global(codes_ptr, scales_ptr, 1.0, start, rows, cols, at, FORMAT, MASKED), MASKED)


@triton.jit
def quantize_kernel(
    pointers_ptr,
    chunks_ptr,
    DECODE: tl.constexpr,
    DENSE_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One chunk of one tensor, encoded or decoded; STEP, the scale of an absmax of 1, is None for plain floats."""
    chunk = chunks_ptr + col.CHUNKS * tl.program_id(0)
    pointers = pointers_ptr + tl.load(chunk + col.CHUNK_TENSOR).to(tl.int64) * col.POINTERS
    rows = tl.load(pointers + col.ROWS)
    cols = tl.load(pointers + col.COLS)
    tensors = (
        pointer(pointers, col.PARAM, DENSE_DTYPE, VECTOR),
        pointer(pointers, col.GLOBAL_GRAD, stored_dtype(FORMAT), (VECTOR + 1) // 2 if FORMAT == "int4" else VECTOR),
        pointer(pointers, col.GLOBAL_SCALE, tl.float32, 1),
    )
    first, end = chunk_range(chunk, rows, cols, MASKED)
    for start in range(first, end, tile_of(MASKED)):
        if DECODE:
            decode_tile(tensors, start, rows, cols, FORMAT, MASKED)
        else:
            encode_tile(tensors, start, rows, cols, FORMAT, STEP, VECTOR, MASKED)


def constants(decode: bool, format: str, dense: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of :func:`quantize_kernel`."""
    chosen = STORAGE_FORMATS[format]
    return {
        "DECODE": decode,
        "DENSE_DTYPE": TRITON_DTYPES[dense],
        "FORMAT": format,
        "STEP": 1.0 / chosen.code_max**chosen.power if chosen.grouped else None,
    }


def _launch(decode: bool, dense: list[torch.Tensor], encoded: list[EncodedTensor]) -> None:
    """One launch for every combination of a dense dtype and a format."""
    combinations = defaultdict(list)
    for i, (tensor, stored) in enumerate(zip(dense, encoded, strict=True)):
        entry = Entry(stored.shape, grouped=stored.scales is not None)
        entry.stream(col.PARAM, address_of(f"tensors[{i}]", tensor))
        entry.store(f"encoded[{i}]", stored)
        combinations[stored.format, tensor.dtype].append(entry)
    for (format, dtype), entries in combinations.items():
        with on_device(dense[0]):
            tables = Tables(entries, dense[0].device)
            for chunks, access in tables.launches(vector_elements(dtype, STORAGE_FORMATS[format].dtype)):
                quantize_kernel[(len(chunks),)](
                    tables.pointers, chunks, **constants(decode, format, dtype), **access, **LAUNCH
                )


@torch.no_grad()
def encode_all(tensors: list[torch.Tensor], format: str) -> list[EncodedTensor]:
    """Encode dense, finite tensors of one device; error bounds as in the reference.

    Args:
        tensors: fp32, bf16 or fp16, any shapes. 1-D and small ones are stored as fp32 whatever ``format`` says.
        format: a name in ``STORAGE_FORMATS``.
    """
    encoded = []
    for tensor in tensors:
        shape = tuple(tensor.shape)
        chosen = storage_format(format, shape)
        codes = torch.empty(chosen.codes_shape(shape), dtype=chosen.dtype, device=tensor.device)
        scales = torch.empty(scales_shape(shape), dtype=torch.float32, device=tensor.device) if chosen.grouped else None
        encoded.append(EncodedTensor(chosen.name, shape, codes, scales))
    _launch(False, [tensor.detach().contiguous() for tensor in tensors], encoded)
    return encoded


@torch.no_grad()
def decode_all(encoded: list[EncodedTensor], outs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The tensors that are stored, in fp32, or written to ``outs`` (fp32, bf16 or fp16, contiguous, same shapes).

    Raises:
        ValueError: storage that is not contiguous.
    """
    if outs is None:
        outs = [torch.empty(stored.shape, dtype=torch.float32, device=stored.device) for stored in encoded]
    _launch(True, outs, encoded)
    return outs


def encode(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """:func:`encode_all` of one tensor."""
    return encode_all([tensor], format)[0]


def decode(encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`decode_all` of one tensor."""
    return decode_all([encoded], None if out is None else [out])[0]

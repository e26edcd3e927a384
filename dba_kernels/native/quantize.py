"""Storage of the global gradient: dense tensors to codes and back."""

from __future__ import annotations

import torch

from ..formats import EncodedTensor, matrix_shape, scales_shape, storage_format
from .descriptors import encoded_addresses
from .library import DTYPE_CODE, GLOBAL_FORMATS, address, execution, load


def encode(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """Store a dense tensor; 1-D and small tensors as fp32 whatever ``format`` says."""
    shape = tuple(tensor.shape)
    chosen = storage_format(format, shape)
    tensor = tensor.detach()
    if not chosen.grouped:
        return EncodedTensor(chosen.name, shape, tensor.to(chosen.dtype, copy=True).contiguous())
    source = (tensor if tensor.dtype in DTYPE_CODE else tensor.float()).contiguous()
    codes = torch.empty(chosen.codes_shape(shape), dtype=chosen.dtype)
    scales = torch.empty(scales_shape(shape), dtype=torch.float32)
    load().dba_encode(
        *execution(),
        DTYPE_CODE[source.dtype],
        GLOBAL_FORMATS.index(chosen.name),
        *matrix_shape(shape),
        source.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return EncodedTensor(chosen.name, shape, codes, scales)


def decode(encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that is stored, in fp32, or written to ``out`` (fp32, bf16 or fp16, contiguous, same shape)."""
    out = torch.empty(encoded.shape, dtype=torch.float32) if out is None else out
    if out.dtype not in DTYPE_CODE:
        raise ValueError(f"out: expected float32, bfloat16 or float16, got {out.dtype}; use backend='reference'")
    codes, scales = encoded_addresses("encoded", encoded, encoded.format)
    load().dba_decode(
        *execution(),
        DTYPE_CODE[out.dtype],
        GLOBAL_FORMATS.index(encoded.format),
        *matrix_shape(encoded.shape),
        codes,
        scales,
        address("out", out, out.dtype, encoded.shape),
    )
    return out

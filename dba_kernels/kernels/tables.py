"""The host's side of every launch: tables of pointers and chunks, and what a launch needs to know of its tensors."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton.language as tl

from .. import formats
from ..formats import EncodedTensor, matrix_shape
from ..stepdata import TensorBatch
from . import columns as col
from .common import ALIGNMENT, CHUNK

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

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


def chunk_table(positions: list[int]) -> list[tuple[int, int]]:
    """``(tensor, first position / CHUNK)`` of every program; each position of each tensor in exactly one chunk."""
    return [(i, k) for i, n in enumerate(positions) for k in range(-(-n // CHUNK.value))]


class Addresses:
    """Device table of the addresses of tensors that may move between steps (gradients): copied only when they do."""

    def __init__(self, n: int, device: torch.device):
        self.table = torch.empty(n, dtype=torch.int64, device=device)
        self._known: list[int] = []

    def refresh(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The table for these tensors.

        Raises:
            ValueError: a tensor is not contiguous, or not of the others' dtype.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._known:
            for i, tensor in enumerate(tensors):
                address_of(f"grads[{i}]", tensor)
                if tensor.dtype != tensors[0].dtype:
                    raise ValueError(
                        f"grads[{i}]: expected {tensors[0].dtype} like grads[0], got {tensor.dtype}; batch them apart"
                    )
            copy_to(self.table, addresses)
            self._known = addresses
        return self.table


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
        self[col.FULL_TILES.value] = int(rows == 1 or cols % formats.GROUP == 0)
        self.positions = rows * -(-cols // formats.GROUP) * formats.GROUP if numel else 0

    def stream(self, column: tl.constexpr, address: int) -> None:
        """A tensor that tiles read or write: full ones only where it is aligned."""
        self[column.value] = address
        self[col.FULL_TILES.value] &= int(address % ALIGNMENT.value == 0)

    def store(self, name: str, stored: EncodedTensor) -> None:
        """A stored tensor: its codes are a stream, its scales are read singly, so of any alignment."""
        self.stream(col.GLOBAL_GRAD, address_of(f"{name}.codes", stored.codes))
        if stored.scales is not None:
            self[col.GLOBAL_SCALE.value] = address_of(f"{name}.scales", stored.scales)


class Tables:
    """Pointer and chunk tables of one launch.

    Args (attributes):
        pointers: int64 ``[n, POINTERS]``.
        chunks: int32 ``[n_chunks, 2]``.
    """

    def __init__(self, entries: list[Entry], device: torch.device):
        chunks = chunk_table([entry.positions for entry in entries])
        first_chunk = 0
        for entry in entries:
            entry[col.FIRST_CHUNK.value] = first_chunk
            entry[col.N_CHUNKS.value] = -(-entry.positions // CHUNK.value)
            first_chunk += entry[col.N_CHUNKS.value]
        self.n_chunks = len(chunks)
        pointers = torch.empty(len(entries), col.POINTERS.value, dtype=torch.int64, device=device)
        self.pointers = copy_to(pointers, entries)
        chunks = chunks or [(0, 0)]
        self.chunks = copy_to(torch.empty(len(chunks), 2, dtype=torch.int32, device=device), chunks)


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

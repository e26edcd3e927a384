"""Descriptors: what one call has to know of every tensor, int64 words laid out as in ``csrc/api.h``.

One call serves a whole model. Those of a batch are kept in ``batch.cache`` between steps.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from ..formats import PARAM_FORMATS, STATE_FORMATS, STORAGE_FORMATS, EncodedTensor, matrix_shape, scales_shape
from ..stepdata import BY_PLAN, CHECKED, TensorBatch
from .library import DTYPE_CODE, GLOBAL_FORMATS, address


class Field:
    """Words of one descriptor: ``Tensor`` in csrc/api.h."""

    ROWS, COLS, INDEX, GRAD_DTYPE, GRAD, PARAM, REMAINDER, EXP_AVG, EXP_AVG_SQ = range(9)
    EXP_AVG_SCALES, EXP_AVG_SQ_SCALES, GLOBAL_CODES, GLOBAL_SCALES, SEED, OFFSET, COUNT = range(9, 16)


class Batch(ctypes.Structure):
    """``Batch`` in csrc/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "dtype", "param_format", "state_format", "global_format")),
        ("tensors", ctypes.c_void_p),
    ]


def checked_grads(
    grads: list[torch.Tensor], shapes: Sequence[tuple[int, ...]]
) -> tuple[list[torch.Tensor], list[int | None], list[int]]:
    """The gradients, contiguous, which must stay alive until the call is over; their dtypes' codes and addresses."""
    kept = grads if all(map(torch.Tensor.is_contiguous, grads)) else [grad.contiguous() for grad in grads]
    codes = list(map(DTYPE_CODE.get, map(_dtype_of, kept)))
    if None in codes or list(map(_shape_of, kept)) != shapes or not all(map(_on_cpu, kept)):
        _refuse(kept, shapes)
    return kept, codes, list(map(torch.Tensor.data_ptr, kept))


_dtype_of, _shape_of, _on_cpu = map(operator.attrgetter, ("dtype", "shape", "is_cpu"))


def _refuse(grads: list[torch.Tensor], shapes: Sequence[tuple[int, ...]]) -> NoReturn:
    """Name the gradient that does not fit."""
    for i, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        if grad.dtype not in DTYPE_CODE or grad.shape != shape or not grad.is_cpu:
            raise ValueError(
                f"grads[{i}]: expected float32, bfloat16 or float16 of shape {tuple(shape)} on the CPU, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )
    raise AssertionError("every gradient fits")


def new_descriptors(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    descriptors = np.zeros((len(shapes), Field.COUNT), dtype=np.int64)
    descriptors[:, [Field.ROWS, Field.COLS]] = np.array([matrix_shape(shape) for shape in shapes]).reshape(-1, 2)
    return descriptors


def encoded_addresses(name: str, stored: EncodedTensor, format: str) -> tuple[int, int]:
    if stored.format != format:
        raise ValueError(f"{name}: expected format {format!r}, got {stored.format!r}")
    chosen = STORAGE_FORMATS[format]
    codes = address(f"{name}.codes", stored.codes, chosen.dtype, chosen.codes_shape(stored.shape))
    if stored.scales is None:
        return codes, 0
    return codes, address(f"{name}.scales", stored.scales, torch.float32, scales_shape(stored.shape))


FIELD_OF = {
    "param": Field.PARAM,
    "remainder": Field.REMAINDER,
    "exp_avg": Field.EXP_AVG,
    "exp_avg_sq": Field.EXP_AVG_SQ,
    "exp_avg_scale": Field.EXP_AVG_SCALES,
    "exp_avg_sq_scale": Field.EXP_AVG_SQ_SCALES,
}


def _param_addresses(batch: TensorBatch) -> list[int]:
    return list(map(torch.Tensor.data_ptr, map(operator.attrgetter("param"), batch.tensors)))


class _Descriptors:
    """The descriptors of a batch, filled once; :meth:`enter` enters what changes from step to step."""

    def __init__(self, batch: TensorBatch, with_state: bool):
        self.by_plan = batch.cache.get(CHECKED) == BY_PLAN
        self.codes: list[int | None] = []
        self.grads: list[int] = []
        self.shapes: list[tuple[int, ...]] = [tuple(tensor.param.shape) for tensor in batch.tensors]
        self.params = _param_addresses(batch)
        self.words = new_descriptors(self.shapes)
        self.words[:, Field.INDEX] = [tensor.index for tensor in batch.tensors]
        self.struct = Batch(count=len(self.params), tensors=self.words.ctypes.data)
        self.struct.global_format = GLOBAL_FORMATS.index(batch.global_format)
        self._enter_global_grads(batch)
        if with_state:
            self._enter_state(batch)

    def _enter_global_grads(self, batch: TensorBatch) -> None:
        for i, stored in enumerate(batch.all("global_grad")):
            if stored.shape != self.shapes[i]:
                raise ValueError(f"tensors[{i}].global_grad: expected shape {self.shapes[i]}, got {stored.shape}")
            addresses = encoded_addresses(f"tensors[{i}].global_grad", stored, batch.global_format)
            self.words[i, Field.GLOBAL_CODES], self.words[i, Field.GLOBAL_SCALES] = addresses

    def _enter_state(self, batch: TensorBatch) -> None:
        dtype = batch.tensors[0].param.dtype
        state, kept = STATE_FORMATS[batch.state_format], PARAM_FORMATS[batch.param_format]
        if dtype not in DTYPE_CODE:
            raise ValueError(f"param: expected float32, bfloat16 or float16, got {dtype}; use backend='reference'")
        if kept.name in ("split16", "split8") and dtype == torch.float32:
            raise ValueError(f"param_format: expected 'native' or 'master' for float32, got {kept.name!r}")
        self.struct.dtype = DTYPE_CODE[dtype]
        self.struct.param_format = list(PARAM_FORMATS).index(kept.name)
        self.struct.state_format = list(STATE_FORMATS).index(state.name)
        for i, (tensor, shape) in enumerate(zip(batch.tensors, self.shapes, strict=True)):
            wanted = {"param": (shape, dtype), **state.parts(shape)}
            if kept.remainder is not None:
                wanted["remainder"] = (shape, kept.remainder)
            for part, (part_shape, part_dtype) in wanted.items():
                where = address(f"tensors[{i}].{part}", getattr(tensor, part), part_dtype, part_shape)
                self.words[i, FIELD_OF[part]] = where
        if kept.stochastic or state.stochastic:
            self.words[:, Field.SEED] = [tensor.seed & 0xFFFFFFFF for tensor in batch.tensors]
            self.words[:, Field.OFFSET] = [tensor.offset for tensor in batch.tensors]

    @staticmethod
    def of(batch: TensorBatch, with_state: bool) -> _Descriptors:
        """The batch's own, made anew where its parameters have moved."""
        key = "native" if with_state else "native.similarity"
        known: _Descriptors | None = batch.cache.get(key)
        if known is None or not (known.by_plan or known.params == _param_addresses(batch)):
            known = batch.cache[key] = _Descriptors(batch, with_state)
        return known

    def enter(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Enter this step's gradients; returns what must stay alive until the call is over."""
        if self.by_plan and self.codes:  # in everything but their place they are what they were
            kept, codes, addresses = grads, self.codes, list(map(torch.Tensor.data_ptr, grads))
        else:
            kept, codes, addresses = checked_grads(grads, self.shapes)
        if codes != self.codes:
            self.words[:, Field.GRAD_DTYPE] = self.codes = codes
        if addresses != self.grads:
            self.words[:, Field.GRAD] = self.grads = addresses
        return kept


def structs_of(
    batches: list[TensorBatch], grads: list[list[torch.Tensor]], with_state: bool
) -> tuple[ctypes.Array[Any], list[Any]]:
    """The structs to pass, and what must stay alive until the call is over."""
    used = [(batch, part) for batch, part in zip(batches, grads, strict=True) if batch.tensors]
    found = [_Descriptors.of(batch, with_state) for batch, _ in used]
    kept: list[Any] = [own.enter(part) for own, (_, part) in zip(found, used, strict=True)]
    if not found:
        return (Batch * 0)(), kept
    cache, key = used[0][0].cache, "native.structs" if with_state else "native.similarity.structs"
    known, structs = cache.get(key, (None, None))
    if known != found:
        structs = (Batch * len(found))(*(own.struct for own in found))
        cache[key] = found, structs
    return structs, kept

"""The operations as ``torch.library`` operators (``torch.ops.dba_kernels.*``) with fakes, for tracing and fake tensors.

An operator takes flat tensors, lists of them and scalars, in the order of the dataclasses that they are taken from; its
schema is made of the fields of these. What stands for its namesake in :mod:`.ops` while something is traced is the
function here: it flattens the arguments and calls the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch

from .backends import serving
from .formats import STORAGE_FORMATS, EncodedTensor, StoredTensor, scales_shape, storage_format
from .stepdata import UPDATED_PARTS, ParamTensors, StepOverrides, StepScalars, StepSettings, TensorBatch

_SCHEMA_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "float | None": "float?",
    "tuple[float, float]": "float[]",
    **{name: name for name in ("float", "int", "str", "bool")},
}
_N_SCALARS, _N_OVERRIDES = len(fields(StepScalars)), len(fields(StepOverrides))
_WRITTEN_SCALARS = ("steps", "bias_corrections", "counters", "coefficients", "report", "summary")
_BATCH = {
    **dict.fromkeys((*UPDATED_PARTS, "codes", "scales"), "Tensor[]"),
    **dict.fromkeys(("index", "seed", "offset"), "int[]"),
    **dict.fromkeys(("param_format", "state_format", "global_format"), "str"),
}


def _fields_of(kind: type) -> dict[str, str]:
    return {field.name: _SCHEMA_TYPES[str(field.type)] for field in fields(kind)}


def _define(
    name: str, run: Callable[..., Any], arguments: dict[str, str], written: Collection[str] = (), result: str = "()"
) -> Any:
    """Register ``run`` under this schema; its fake returns nothing, as suits an operator that only writes."""
    marked = {
        argument: kind.replace("Tensor", f"Tensor(a{i}!)") if argument in written else kind
        for i, (argument, kind) in enumerate(arguments.items())
    }
    schema = f"({', '.join(f'{kind} {argument}' for argument, kind in marked.items())}) -> {result}"
    operator = torch.library.custom_op(f"dba_kernels::{name}", run, mutates_args=tuple(written), schema=schema)
    operator.register_fake(lambda *args: None)
    return operator


# --- accumulate, quantize ---------------------------------------------------------------------------------------------


def _accumulate(
    totals: list[torch.Tensor], grads: list[torch.Tensor], weight: float, squared_norms: torch.Tensor, backend: str
) -> None:
    serving(backend, "accumulate", totals[0].device, totals[0].dtype).accumulate(totals, grads, weight, squared_norms)


accumulate = _define(
    "accumulate",
    _accumulate,
    {"totals": "Tensor[]", "grads": "Tensor[]", "weight": "float", "squared_norms": "Tensor", "backend": "str"},
    written=("totals", "squared_norms"),
)


def encode(tensor: torch.Tensor, format: str, backend: str) -> EncodedTensor:
    chosen = storage_format(format, tuple(tensor.shape))
    codes, scales = torch.ops.dba_kernels.encode(tensor, chosen.name, backend)
    return EncodedTensor(chosen.name, tuple(tensor.shape), codes, scales if chosen.grouped else None)


def _encode(tensor: torch.Tensor, format: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    encoded = serving(backend, "quantize", tensor.device, tensor.dtype).encode(tensor, format)
    return encoded.codes, tensor.new_empty(0, dtype=torch.float32) if encoded.scales is None else encoded.scales


_encode_operator = _define(
    "encode", _encode, {"tensor": "Tensor", "format": "str", "backend": "str"}, result="(Tensor, Tensor)"
)


@_encode_operator.register_fake
def _(tensor: torch.Tensor, format: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, shape = STORAGE_FORMATS[format], tuple(tensor.shape)
    codes = tensor.new_empty(chosen.codes_shape(shape), dtype=chosen.dtype)
    return codes, tensor.new_empty(scales_shape(shape) if chosen.grouped else (0,), dtype=torch.float32)


def decode(stored: EncodedTensor, backend: str) -> torch.Tensor:
    shape = list(stored.shape)
    decoded: torch.Tensor = torch.ops.dba_kernels.decode(stored.codes, stored.scales, shape, stored.format, backend)
    return decoded


def _decode(
    codes: torch.Tensor, scales: torch.Tensor | None, shape: list[int], format: str, backend: str
) -> torch.Tensor:
    encoded = EncodedTensor(format, tuple(shape), codes, scales)
    decoded: torch.Tensor = serving(backend, "quantize", codes.device, torch.float32).decode(encoded)
    return decoded.clone() if decoded.data_ptr() == codes.data_ptr() else decoded  # an op must not return its input


_decode_operator = _define(
    "decode",
    _decode,
    {"codes": "Tensor", "scales": "Tensor?", "shape": "int[]", "format": "str", "backend": "str"},
    result="Tensor",
)


@_decode_operator.register_fake
def _(codes: torch.Tensor, scales: torch.Tensor | None, shape: list[int], format: str, backend: str) -> torch.Tensor:
    return codes.new_empty(shape, dtype=torch.float32)


# --- similarity, coefficients, step -----------------------------------------------------------------------------------


def flat(batch: TensorBatch) -> tuple[Any, ...]:
    """The batch as arguments of an operator, in the order of ``_BATCH``."""
    stored = batch.all("global_grad")
    return (
        *(batch.all(part) for part in UPDATED_PARTS),
        [kept.codes for kept in stored],
        [kept.scales for kept in stored if kept.scales is not None],
        *(batch.all(name) for name in ("index", "seed", "offset")),
        *(batch.param_format, batch.state_format, batch.global_format),
    )


def _batch(arguments: tuple[Any, ...]) -> TensorBatch:
    """The inverse of :func:`flat`."""
    found = dict(zip(_BATCH, arguments, strict=True))
    codes, scales = found.pop("codes"), found.pop("scales")
    param_format, state_format, global_format = (found.pop(f"{name}_format") for name in ("param", "state", "global"))
    stored: list[StoredTensor] = [
        EncodedTensor(global_format, tuple(param.shape), kept, scales[i] if scales else None)
        for i, (param, kept) in enumerate(zip(found["param"], codes, strict=False))  # none without a global gradient
    ]
    columns = {name: values for name, values in (found | {"global_grad": stored}).items() if values}
    rows = zip(*columns.values(), strict=True)
    tensors = [ParamTensors(**dict(zip(columns, row, strict=True))) for row in rows]
    return TensorBatch(param_format, state_format, global_format, tensors)


def _module(batch: TensorBatch, backend: str, stem: str) -> Any:
    return serving(backend, stem, batch.device, batch.tensors[0].param.dtype)


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor, backend: str) -> None:
    torch.ops.dba_kernels.similarity(*flat(batch), grads, sums, backend)


def _similarity(*arguments: Any) -> None:
    *flattened, grads, sums, backend = arguments
    batch = _batch(tuple(flattened))
    _module(batch, backend, "similarity").similarity(batch, grads, sums)


_define(
    "similarity", _similarity, {**_BATCH, "grads": "Tensor[]", "sums": "Tensor", "backend": "str"}, written=("sums",)
)


def step(batch: TensorBatch, grads: list[torch.Tensor], coefficients: torch.Tensor, backend: str) -> None:
    torch.ops.dba_kernels.step(*flat(batch), grads, coefficients, backend)


def _step(*arguments: Any) -> None:
    *flattened, grads, coefficients, backend = arguments
    batch = _batch(tuple(flattened))
    _module(batch, backend, "step").step(batch, grads, coefficients)


_define(
    "step", _step, {**_BATCH, "grads": "Tensor[]", "coefficients": "Tensor", "backend": "str"}, written=UPDATED_PARTS
)


def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides, backend: str) -> None:
    parts = [getattr(data, field.name) for data in (scalars, overrides, settings) for field in fields(data)]
    torch.ops.dba_kernels.coefficients(*parts, backend)


def _coefficients(*arguments: Any) -> None:
    *parts, backend = arguments
    scalars, overrides = StepScalars(*parts[:_N_SCALARS]), StepOverrides(*parts[_N_SCALARS:][:_N_OVERRIDES])
    settings = StepSettings(*parts[_N_SCALARS + _N_OVERRIDES :])
    module = serving(backend, "coefficients", scalars.coefficients.device, torch.float32)
    module.coefficients(scalars, settings, overrides)


_define(
    "coefficients",
    _coefficients,
    {**_fields_of(StepScalars), **_fields_of(StepOverrides), **_fields_of(StepSettings), "backend": "str"},
    written=_WRITTEN_SCALARS,
)

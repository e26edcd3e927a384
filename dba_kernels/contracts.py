"""What the operations of :mod:`.ops` take, checked at their door: backends see addresses and trust them.

Every check raises TypeError for another kind of object and ValueError for another value; both name the argument, what
was expected and what it got. Batches that a plan has laid out are checked there (:mod:`.checks`), once, and say so in
their cache; those of others are checked here, with their gradients at every call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .formats import (
    PARAM_FORMATS,
    STATE_FORMATS,
    STORAGE_FORMATS,
    EncodedTensor,
    LowRankTensor,
    check_integer,
    check_name,
    check_type,
    matrix_shape,
    scales_shape,
)
from .stepdata import (
    BY_PLAN,
    CHECKED,
    NO_OVERRIDES,
    UPDATED_PARTS,
    Coefficient,
    Factors,
    Hyper,
    ParamTensors,
    StepOverrides,
    StepScalars,
    StepSettings,
    Summary,
    TensorBatch,
)

HERE = "here"
"""A batch that was checked by this module."""

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*GRAD_DTYPES, torch.float64)
DEVICES = ("cpu", "cuda")


def check_tensor(
    name: str,
    value: Any,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """A tensor whose address a backend may take.

    Args:
        shape: its shape; None in place of a size: any; of dimension 0, ``-n``: at least n.
        device: where it must be; None: any that a backend serves.
    """
    check_type(name, value, torch.Tensor)
    if is_traceable_wrapper_subclass(value) or value.layout != torch.strided:
        kind = type(value).__name__ if value.layout == torch.strided else value.layout
        raise ValueError(f"{name}: expected a dense tensor with storage of its own, got {kind}; convert it first")
    if value.dtype not in dtypes:
        raise ValueError(f"{name}: expected {_listed(map(_dtype, dtypes))}, got {value.dtype}")
    if value.device.type not in DEVICES or (device is not None and value.device != device):
        wanted = "a CPU or CUDA device" if device is None else str(device)
        raise ValueError(f"{name}: expected a tensor on {wanted}, got one on {value.device}; move it")
    if shape is not None and not _fits(value.shape, shape):
        raise ValueError(f"{name}: expected shape {_shown(shape)}, got {tuple(value.shape)}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: expected contiguous storage, got strides {value.stride()}; call .contiguous()")


def _fits(got: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(got) == len(wanted) and all(
        want is None or size == want or (want < 0 and size >= -want) for size, want in zip(got, wanted, strict=True)
    )


def _shown(shape: Sequence[int | None]) -> str:
    sizes = ["any" if size is None else f"at least {-size}" if size < 0 else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def check_list(name: str, value: Any, length: int | None = None) -> None:
    check_type(name, value, (list, tuple))
    if length is not None and len(value) != length:
        raise ValueError(f"{name}: expected {length} of them, got {len(value)}")


# --- accumulate, quantize ---------------------------------------------------------------------------------------------


def check_accumulation(totals: Any, grads: Any, weight: Any, squared_norms: Any) -> None:
    check_list("totals", totals)
    check_list("grads", grads, len(totals))
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise (ValueError if isinstance(weight, float) else TypeError)(
            f"weight: expected a finite number, got {weight!r}"
        )
    if not totals:
        return
    for i, (total, grad) in enumerate(zip(totals, grads, strict=True)):
        check_tensor(f"totals[{i}]", total, (torch.float32, torch.float64), None, totals[0].device if i else None)
        if i and total.dtype != totals[0].dtype:
            raise ValueError(f"totals[{i}]: expected {totals[0].dtype}, as the others, got {total.dtype}")
        dtypes = FLOATS if total.dtype == torch.float64 else GRAD_DTYPES
        check_tensor(f"grads[{i}]", grad, dtypes, tuple(total.shape), total.device, contiguous=False)
    check_tensor("squared_norms", squared_norms, (torch.float64,), (len(totals),), totals[0].device)


def check_dense(name: str, tensors: Any) -> None:
    check_list(name, tensors)
    for i, tensor in enumerate(tensors):
        device = tensors[0].device if i else None
        check_tensor(f"{name}[{i}]", tensor, FLOATS, None, device, contiguous=False)


def check_encoded(name: str, stored: Any, device: torch.device | None = None) -> None:
    """An :class:`EncodedTensor` whose parts are those of its format."""
    check_type(name, stored, EncodedTensor)
    check_name(f"{name}.format", stored.format, STORAGE_FORMATS)
    check_shape(f"{name}.shape", stored.shape)
    chosen = STORAGE_FORMATS[stored.format]
    check_tensor(f"{name}.codes", stored.codes, (chosen.dtype,), chosen.codes_shape(stored.shape), device)
    if chosen.grouped:
        where = stored.codes.device
        check_tensor(f"{name}.scales", stored.scales, (torch.float32,), scales_shape(stored.shape), where)


def check_stored(name: str, stored: Any, device: torch.device | None = None) -> None:
    """An encoded or a low-rank tensor."""
    if isinstance(stored, LowRankTensor):
        check_shape(f"{name}.shape", stored.shape)
        check_tensor(f"{name}.sigma", stored.sigma, (torch.float32,), (None,), device)
        for part, size in zip(("u", "v"), matrix_shape(tuple(stored.shape)), strict=True):
            factor = getattr(stored, part)
            check_encoded(f"{name}.{part}", factor, stored.sigma.device)
            if tuple(factor.shape) != (size, stored.rank):
                raise ValueError(f"{name}.{part}: expected shape {(size, stored.rank)}, got {tuple(factor.shape)}")
    else:
        check_encoded(name, stored, device)


def check_shape(name: str, shape: Any) -> None:
    check_type(name, shape, (tuple, list))
    for size in shape:
        check_integer(name, size, 0)


# --- similarity, coefficients, step -----------------------------------------------------------------------------------


def check_batch(batch: Any, grads: Any, table: str, rows: Any, columns: int, steps: bool) -> None:
    """A batch with its gradients, and the float64 table of which it reads or writes its parameters' rows.

    Args:
        table, rows, columns: the table's name, itself, and how many columns it has.
        steps: whether the state is needed.
    """
    check_type("batch", batch, TensorBatch)
    known = batch.cache.get(CHECKED)
    if known == BY_PLAN:
        return
    if known != (HERE, steps):
        _check_records(batch, steps)
        batch.cache[CHECKED] = (HERE, steps)
    check_list("grads", grads, len(batch.tensors))
    for i, (tensor, grad) in enumerate(zip(batch.tensors, grads, strict=True)):
        param = tensor.param
        check_tensor(f"grads[{i}]", grad, {*GRAD_DTYPES, param.dtype}, tuple(param.shape), param.device)
        if grad.dtype != grads[0].dtype:
            raise ValueError(f"grads[{i}]: expected {grads[0].dtype}, as the others, got {grad.dtype}")
    least = 1 + max(tensor.index for tensor in batch.tensors)
    check_tensor(table, rows, (torch.float64,), (-least, columns), batch.device)


def _check_records(batch: TensorBatch, steps: bool) -> None:
    check_name("batch.param_format", batch.param_format, PARAM_FORMATS)
    check_name("batch.state_format", batch.state_format, STATE_FORMATS)
    check_name("batch.global_format", batch.global_format, (*STORAGE_FORMATS, "lowrank", "none"))
    check_list("batch.tensors", batch.tensors)
    if not batch.tensors:
        raise ValueError("batch.tensors: expected at least one parameter, got none")
    for i, tensor in enumerate(batch.tensors):
        name = f"batch.tensors[{i}]"
        check_type(name, tensor, ParamTensors)
        first = batch.tensors[0].param
        halves = (torch.bfloat16, torch.float16)
        dtypes = ((first.dtype,) if i else FLOATS) if batch.param_format == "native" else halves
        check_tensor(f"{name}.param", tensor.param, dtypes, None, first.device if i else None)
        if i and tensor.param.dtype != first.dtype:
            raise ValueError(f"{name}.param: expected {first.dtype}, as the others, got {tensor.param.dtype}")
        for number, least in (("index", 0), ("seed", 0), ("offset", 0)):
            check_integer(f"{name}.{number}", getattr(tensor, number), least)
        _check_state(name, tensor, batch, steps)
        _check_global(name, tensor, batch.global_format)


def _check_state(name: str, tensor: ParamTensors, batch: TensorBatch, steps: bool) -> None:
    shape, device = tuple(tensor.param.shape), tensor.param.device
    wanted = dict(STATE_FORMATS[batch.state_format].parts(shape, tensor.param.dtype))
    if (kept := PARAM_FORMATS[batch.param_format].remainder) is not None:
        wanted["remainder"] = (shape, kept)
    for part in UPDATED_PARTS[1:]:
        value = getattr(tensor, part)
        if part in wanted and (steps or value is not None):
            check_tensor(f"{name}.{part}", value, (wanted[part][1],), wanted[part][0], device)


def _check_global(name: str, tensor: ParamTensors, global_format: str) -> None:
    stored, shape = tensor.global_grad, tuple(tensor.param.shape)
    if global_format == "none":
        return
    name = f"{name}.global_grad"
    if isinstance(stored, Factors):
        rows, cols = matrix_shape(shape)
        check_tensor(f"{name}.left", stored.left, (torch.float32, torch.bfloat16), (rows, None), tensor.param.device)
        rank = stored.left.shape[1]
        check_tensor(f"{name}.right", stored.right, (stored.left.dtype,), (rank, cols), contiguous=False)
    else:
        check_stored(name, stored, None if global_format == "lowrank" else tensor.param.device)
    if stored.format != global_format or tuple(stored.shape) != shape:
        raise ValueError(
            f"{name}: expected {global_format} of shape {shape}, got {stored.format} of {tuple(stored.shape)}"
        )


def check_scalars(scalars: Any, settings: Any, overrides: Any) -> None:
    """What ``coefficients`` takes."""
    check_type("scalars", scalars, StepScalars)
    check_type("settings", settings, StepSettings)
    check_type("overrides", overrides, StepOverrides)
    check_type("scalars.coefficients", scalars.coefficients, torch.Tensor)
    if overrides is not NO_OVERRIDES:
        _check_overrides(overrides, scalars.coefficients)
    known = _checked.get(id(scalars))
    if known is not None and known() is scalars:
        return
    _check_columns(scalars)
    number = id(scalars)
    _checked[number] = weakref.ref(scalars, lambda _: _checked.pop(number, None))


_checked: dict[int, weakref.ref[StepScalars]] = {}
"""By identity: a plan's scalars are checked once, not at every step."""


def _check_columns(scalars: StepScalars) -> None:
    n, device = scalars.coefficients.shape[0] if scalars.coefficients.dim() else 0, scalars.coefficients.device
    shapes: dict[str, tuple[int | None, ...]] = {
        **{"sums": (n, 2), "bias_corrections": (n, 2), "report": (n, 2), "coefficients": (n, Coefficient.COUNT)},
        **{"global_sq": (n,), "group": (n,), "steps": (n,), "active": (None,), "counters": (2,)},
        **{"summary": (Summary.COUNT,), "hyper": (None, Hyper.COUNT)},
    }
    dtypes = {"group": torch.int64, "active": torch.int64, "counters": torch.int64, "steps": torch.float32}
    for name, shape in shapes.items():
        dtype = dtypes.get(name, torch.float64)
        check_tensor(f"scalars.{name}", getattr(scalars, name), (dtype,), shape, device if n else None)
    if device.type == "cpu" and not isinstance(scalars.group, FakeTensor):  # elsewhere reading them would wait
        for name, rows in (("group", scalars.hyper.shape[0]), ("active", n)):
            numbers = getattr(scalars, name)
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < rows:
                raise ValueError(f"scalars.{name}: expected rows below {rows}, got {numbers.tolist()[:8]}")


def _check_overrides(overrides: StepOverrides, table: torch.Tensor) -> None:
    n, device = table.shape[0] if table.dim() else 0, table.device
    for field in fields(StepOverrides):
        value = getattr(overrides, field.name)
        if value is not None:
            check_tensor(f"overrides.{field.name}", value, FLOATS, None, device, contiguous=False)
            if value.numel() != (n if field.name == "alpha" else 1):
                raise ValueError(f"overrides.{field.name}: expected one number, or n for alpha, got {value.numel()}")

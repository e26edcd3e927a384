"""One tensor of more than 2³¹ elements: addresses, chunks and random words beyond 32 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import ops
from dba_kernels.formats import PARAM_FORMATS, STORAGE_FORMATS, EncodedTensor, scales_shape
from dba_kernels.stepdata import UPDATED_PARTS, ParamTensors, TensorBatch
from tests.support.cases import coefficient_table
from tests.support.tolerances import TOLERANCES

from . import exact
from .device import DEVICE, SIMULATED, generator

if TYPE_CHECKING:
    from .report import Report

COLS = 128 if SIMULATED else 4096
ROWS = 96 if SIMULATED else 2**31 // COLS + 64
SLICE = 16
"""Rows that are compared at each place."""


def batch_of(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, state: str, stored: str, grad: torch.dtype, seed: int = 0
) -> tuple[TensorBatch, list[torch.Tensor]]:
    """One tensor in these formats, of random codes made on the device: no wide copy of it ever exists."""
    draw = generator(seed)

    def normal(dtype: torch.dtype, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE, dtype=dtype).mul_(scale)

    def codes(dtype: torch.dtype, low: int, high: int, size: tuple[int, ...] = shape) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=draw, device=DEVICE, dtype=dtype)

    def scales(scale: float) -> torch.Tensor:
        return torch.rand(scales_shape(shape), generator=draw, device=DEVICE).add_(0.5).mul_(scale)

    parts = {"param": normal(dtype, 0.05)}
    rest = PARAM_FORMATS[kind].remainder
    if kind == "master":
        parts["remainder"] = parts["param"].float()
    elif rest is not None:
        half = torch.iinfo(rest).max // 2  # valid wherever the weight is no power of two
        parts["remainder"] = codes(rest, -half, half)
    if state == "int8":
        parts |= {"exp_avg": codes(torch.int8, -127, 127), "exp_avg_sq": codes(torch.uint8, 1, 255)}
        parts |= {"exp_avg_scale": scales(1e-6), "exp_avg_sq_scale": scales(1e-14)}
    else:
        moment = torch.float32 if state == "fp32" else torch.bfloat16
        parts |= {"exp_avg": normal(moment, 1e-2), "exp_avg_sq": normal(moment, 1e-2).square_()}
    kept = None if stored == "none" else stored_codes(shape, stored, draw)
    batch = TensorBatch(kind, state, stored, [ParamTensors(1, **parts, global_grad=kept, seed=12345)])
    return batch, [normal(grad, 1e-2)]


def stored_codes(shape: tuple[int, int], format: str, draw: torch.Generator) -> EncodedTensor:
    """A global gradient of random codes."""
    chosen = STORAGE_FORMATS[format]
    size = chosen.codes_shape(shape)
    if not chosen.grouped:
        return EncodedTensor(format, shape, torch.randn(size, generator=draw, device=DEVICE, dtype=chosen.dtype))
    scales = torch.rand(scales_shape(shape), generator=draw, device=DEVICE).mul_(1e-5)
    if format == "int8":
        codes = torch.randint(-127, 128, size, generator=draw, device=DEVICE, dtype=torch.int8)
    else:  # every byte but those that hold a code that no encoder writes
        codes = torch.randint(0, 0x78, size, generator=draw, device=DEVICE, dtype=torch.uint8)
        codes = codes.where(codes & 0xF != 8, 0) if format == "int4" else codes
    return EncodedTensor(format, shape, codes, scales)


def rows_of(batch: TensorBatch, start: int, stop: int) -> TensorBatch:
    """These rows of its only tensor, as a batch that knows where they lie."""
    tensor = batch.tensors[0]
    parts = {part: getattr(tensor, part) for part in UPDATED_PARTS}
    cut: dict[str, Any] = {part: value[start:stop].clone() for part, value in parts.items() if value is not None}
    stored = None if tensor.global_grad is None else tensor.global_grad.row_slice(start, stop)
    own = replace(tensor, **cut, global_grad=stored, offset=start * tensor.param.shape[1])
    return replace(batch, tensors=[own], cache={})


def sums_of(batch: TensorBatch, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 (dot, square) and the sums of absolute terms, some rows at a time."""
    want, terms = (torch.zeros(2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    block = max(1, 2**26 // COLS)
    for start in range(0, len(grad), block):
        encoded = batch.tensors[0].global_grad
        assert encoded is not None
        stored = exact.stored(encoded.row_slice(start, min(start + block, len(grad))))
        wide = grad[start : start + block].double()
        square = wide.square().sum()
        want += torch.stack(((wide * stored).sum(), square))
        terms += torch.stack(((wide * stored).abs().sum(), square))
    return want, terms


def check(kind: str, stored: str) -> dict[str, Any]:
    """One step and both sums; slices at the start, around elements 2³⁰ and 2³¹, and at the end, in float64."""
    needed = 11 * ROWS * COLS + 2**31
    if not SIMULATED and torch.cuda.mem_get_info()[0] < needed:
        from .report import Absent

        raise Absent(f"needs {needed / 2**30:.0f} GiB of free memory")
    batch, grads = batch_of((ROWS, COLS), torch.bfloat16, kind, "int8", stored, torch.bfloat16)
    table = coefficient_table(3, generator(1))
    places = [0, 2**30 // COLS - SLICE // 2, 2**31 // COLS - SLICE // 2, ROWS - SLICE]
    places = sorted({min(max(place, 0), ROWS - SLICE) for place in places})
    before = {place: rows_of(batch, place, place + SLICE) for place in places}
    sums = torch.full((3, 2), float("nan"), dtype=torch.float64, device=DEVICE)
    ops.similarity(batch, grads, sums, "triton")
    want, terms = sums_of(batch, grads[0])
    assert bool(((sums[1] - want).abs() <= TOLERANCES["sum"].bound * terms).all()), f"sums {sums[1]}, expected {want}"
    ops.step(batch, grads, table, "triton")
    for place, part in before.items():
        after = rows_of(batch, place, place + SLICE)
        exact.check_step(after, 0, exact.expected(part, grads[0][place : place + SLICE], table, 0), table)
    return {"elements": ROWS * COLS, "rows compared": places}


def run(report: Report) -> None:
    report.attempt("more than 2^31 elements, split8, int4", check, "split8", "int4")

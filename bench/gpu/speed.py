"""Bandwidth of every production kernel, beside copy and triad measured in the same run and beside the prediction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bench import variants
from bench.variants import VARIANTS, Variant
from dba_kernels import ops
from tests.support.cases import coefficient_table

from .device import DEVICE, SIMULATED, device_seconds, free_memory, generator
from .large import batch_of, stored_codes

if TYPE_CHECKING:
    from .report import Report

SHAPE = (64, 128) if SIMULATED else (16384, 4096)
"""67 M elements: far more bytes than any cache holds."""
OTHER_PATH = re.compile(r", (narrow|masked)$")
"""Kernels for misaligned tensors: ``steps`` times them, on misaligned gradients."""
DTYPES = {str(kind): dtype for dtype, kind in variants.TRITON_DTYPES.items()}


def streams(run: Callable[[], Any], count: int, elements: int) -> dict[str, float]:
    seconds = device_seconds(run)
    return {"GB/s": 4 * count * elements / seconds / 1e9, "us": seconds * 1e6}


def check_copy() -> dict[str, float]:
    source = torch.empty(SHAPE, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return streams(lambda: target.copy_(source), 2, source.numel())


def check_triad() -> dict[str, float]:
    """a ← b + s·c: two streams read, one written."""
    a, b, c = (torch.empty(SHAPE, device=DEVICE).normal_() for _ in range(3))
    return streams(lambda: torch.add(b, c, alpha=0.5, out=a), 3, a.numel())


def check_update() -> dict[str, float]:
    """AdamW's own pattern, fp32: torch's fused step, four streams read and three written."""
    param = torch.nn.Parameter(torch.empty(SHAPE, device=DEVICE).normal_())
    param.grad = torch.empty_like(param).normal_()
    optimizer = torch.optim.AdamW([param], lr=1e-5, fused=True)
    optimizer.step()
    return streams(optimizer.step, 7, param.numel())


def predictions(name: str) -> dict[str, str]:
    """Time as ``bench.roofline`` predicts it, for comparison with what was measured."""
    try:
        from bench import roofline

        row = roofline.analyse(next(variant for variant in VARIANTS if variant.name == name))
        return {
            gpu: f"{time:.1f} us/M ({why})"
            for gpu in roofline.BANDWIDTH
            for time, why in [roofline.predicted(row, gpu)]
        }
    except Exception as error:  # no disassembler, or no rich: a figure less
        return {"none": f"{type(error).__name__}: {error}"[:200]}


def launch_of(variant: Variant) -> Callable[[], Any]:
    """A call that runs this variant on one large tensor."""
    constants = variant.constants
    stem = variant.name.split()[0]
    if stem in ("step", "similarity"):
        grad = DTYPES[str(constants["GRAD_DTYPE"])]
        dtype = DTYPES[str(constants["PARAM_DTYPE"])] if stem == "step" else grad
        formats = (constants.get("PARAM_FORMAT", "native"), constants.get("STATE_FORMAT", "fp32"))
        batch, grads = batch_of(SHAPE, dtype, *formats, constants["GLOBAL_FORMAT"], grad)
        table, sums = coefficient_table(3, generator(1)), torch.zeros(3, 2, dtype=torch.float64, device=DEVICE)
        if stem == "step":
            return lambda: ops.step(batch, grads, table, "triton")
        return lambda: ops.similarity(batch, grads, sums, "triton")
    if stem == "accumulate":
        grad = torch.empty(SHAPE, dtype=DTYPES[str(constants["GRAD_DTYPE"])], device=DEVICE).normal_()  # type: ignore[assignment]
        total, norm = torch.zeros(SHAPE, device=DEVICE), torch.zeros(1, dtype=torch.float64, device=DEVICE)
        return lambda: ops.accumulate([total], [grad], 1.0, norm, "triton")  # type: ignore[list-item]
    if constants["DECODE"]:
        encoded = stored_codes(SHAPE, constants["FORMAT"], generator(2))
        return lambda: ops.decode_all([encoded], "triton")
    dense = torch.empty(SHAPE, dtype=DTYPES[str(constants["DENSE_DTYPE"])], device=DEVICE).normal_()
    return lambda: ops.encode_all([dense], constants["FORMAT"], "triton")


def check_variant(variant: Variant) -> dict[str, Any]:
    """What a user's call of it takes; stage 1 reads its gradients once more for their norm."""
    free_memory()
    run = launch_of(variant)
    run()
    seconds = device_seconds(run)
    elements = SHAPE[0] * SHAPE[1]
    moved = variant.bytes_per_parameter + (2 if variant.name.startswith("accumulate") else 0)
    if variant.name.startswith("decode"):
        moved += 2  # a call of decode_all writes fp32, not bf16
    found: dict[str, Any] = {"us per M": seconds / elements * 1e12, "GB/s": moved * elements / seconds / 1e9}
    if not SIMULATED:
        found |= {"B/param": moved, "predicted": predictions(variant.name)}
    return found


def run(report: Report) -> None:
    report.attempt("copy", check_copy)
    report.attempt("triad", check_triad)
    report.attempt("torch fused AdamW, fp32", check_update)
    measured = [variant for variant in VARIANTS if variant.bytes_per_parameter and not OTHER_PATH.search(variant.name)]
    for variant in measured[::6] if SIMULATED else measured:
        report.attempt(variant.name, check_variant, variant)

"""What surrounds a step: its coefficients in every mode, the codecs of stored tensors, the sums of stage 1."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import ops
from dba_kernels.formats import STORAGE_FORMATS, EncodedTensor, scales_shape
from dba_kernels.stepdata import StepOverrides, StepScalars, StepSettings
from tests.support import agreement as modes
from tests.support.cases import GRAD_DTYPES, Misaligned, random_tensor
from tests.support.tolerances import TOLERANCES

from . import exact
from .device import DEVICE, SIMULATED, generator

if TYPE_CHECKING:
    from .report import Report

SHAPES = ((64, 128), (65, 77), (3, 1501), (70, 3, 33)) + (() if SIMULATED else ((1, 24581), (1, 8193), (513, 1024)))
SUMMED = ((0,), (1,), (63,), (), (40, 128), (7, 777)) + (
    () if SIMULATED else ((8191,), (8193,), (24581,), (4096, 4096))
)
MANY = (7, 257, 700) if SIMULATED else (7, 256, 257, 700, 5000)


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides) -> None:
    ops.coefficients(scalars, settings, overrides, "triton")


def check_mode(changes: dict[str, Any], optional: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    settings = dataclasses.replace(modes.BASE, **changes)
    modes.assert_same_coefficients(coefficients, settings, on_device(inputs), on_device(optional))


def spoiled(value: float) -> dict[str, torch.Tensor]:
    """Inputs in which the gradient of an active parameter is not finite."""
    inputs = modes.arguments()
    inputs["sums"][modes.ACTIVE[1], 1] = value
    return inputs


def check_many(n: int) -> None:
    """More parameters than one program takes at once, in another order."""
    inputs = modes.arguments()
    copies = -(-n // len(inputs["steps"]))
    for name in ("sums", "global_sq", "group", "steps", "bias_corrections", "coefficients", "report"):
        inputs[name] = inputs[name].repeat(copies, *[1] * (inputs[name].dim() - 1))
    inputs["active"] = torch.arange(n - 1, -1, -1)
    check_mode({}, {}, inputs)


def check_encode(format: str, dtype: torch.dtype) -> None:
    tensors = [random_tensor(shape, generator(1)).to(dtype) for shape in SHAPES]
    tensors[0][0] = 0.0  # groups without a scale
    tensors[0][1], tensors[0][2, ::64] = 1e-37, 1e4
    for tensor, encoded in zip(tensors, ops.encode_all(tensors, format, "triton"), strict=True):
        exact.check_encoding(tensor, encoded)


def every_code(format: str, shape: tuple[int, ...]) -> EncodedTensor:
    """All codes that an encoder can write, with scales of all sizes."""
    chosen = STORAGE_FORMATS[format]
    size = chosen.codes_shape(shape)
    if not chosen.grouped:
        return EncodedTensor(format, shape, random_tensor(size, generator(2)).to(chosen.dtype))
    codes = torch.arange(size[0] * size[1], device=DEVICE).reshape(size) * 7 % 256
    if format == "fp8_e4m3":
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes)  # NaN
    elif format == "int8":
        codes = torch.where(codes == 128, 0, codes)
    else:
        codes = torch.where((codes & 0xF == 8) | (codes >> 4 == 8), 0, codes)
        if shape[-1] % 2:
            codes[:, -1] &= 0xF
    codes = codes.to(torch.uint8).view(chosen.dtype)
    scales = 2.0 ** (20 * torch.rand(scales_shape(shape), generator=generator(3), device=DEVICE) - 15)
    return EncodedTensor(format, shape, codes, scales)


def check_decode(format: str) -> None:
    stored = [every_code(format, shape) for shape in ((64, 128), (65, 77), (7, 1501))]
    for encoded, dense in zip(stored, ops.decode_all(stored, "triton"), strict=True):
        exact.check_decoding(encoded, dense)


def check_accumulate(dtype: torch.dtype, elements: int, poison: float | None = None) -> None:
    """Three micro-batches of different weight; in the second one a gradient is not finite."""
    place = Misaligned(elements)
    totals = [place(random_tensor(shape, generator(4))) for shape in SUMMED]
    for k, weight in enumerate((1.0, 0.3, 7.0)):
        grads = [place(random_tensor(shape, generator(5 + k)).to(dtype)) for shape in SUMMED]
        if k == 1 and poison is not None:
            grads[4][-1] = poison
        before = [total.clone() for total in totals]
        norms = place(torch.full((len(SUMMED),), float("nan"), dtype=torch.float64, device=DEVICE))
        ops.accumulate(totals, grads, weight, norms, "triton")
        for i, (old, grad, total) in enumerate(zip(before, grads, totals, strict=True)):
            finite = bool(torch.isfinite(grad).all())
            assert bool(torch.isfinite(norms[i])) == finite, f"norm {i}: {float(norms[i])} of a gradient, {finite=}"
            if not finite:
                assert torch.equal(old, total), f"total {i}: a gradient that is not finite was added"
                continue
            exact.check_accumulated(old, grad, weight, total)
            want = grad.double().square().sum()
            assert bool((norms[i] - want).abs() <= TOLERANCES["sum"].bound * want), f"norm {i}: {norms[i]}, not {want}"
    place.check()


def run(report: Report) -> None:
    for name, changes in modes.VARIANTS.items():
        report.attempt(f"coefficients {name}", check_mode, changes, {}, modes.arguments())
    for name, optional in modes.OPTIONS.items():
        report.attempt(f"coefficients {name}", check_mode, {}, optional, modes.arguments())
    for value in (float("nan"), float("inf")):
        report.attempt(f"coefficients with a sum of {value}", check_mode, {}, {}, spoiled(value))
    for n in MANY:
        report.attempt(f"coefficients of {n} parameters", check_many, n)
    for dtype in GRAD_DTYPES:
        for elements in (0, 1):
            report.attempt(f"accumulate {dtype}, {elements} elements off", check_accumulate, dtype, elements)
    for poison in (float("nan"), float("inf")):
        report.attempt(f"accumulate a gradient with {poison}", check_accumulate, torch.bfloat16, 0, poison)
    for k, format in enumerate(STORAGE_FORMATS):
        report.attempt(f"encode {format}", check_encode, format, GRAD_DTYPES[k % 3])
        report.attempt(f"decode {format}", check_decode, format)

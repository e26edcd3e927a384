"""Every kernel on the device against the reference on the CPU, by the comparisons and tolerances of the test suite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dba_kernels.kernels import accumulate, coefficients, quantize, similarity, step
from dba_kernels.reference import quantize as reference
from dba_kernels.stepdata import StepOverrides, StepScalars, StepSettings, TensorBatch
from tests.support import agreement, cases, step_agreement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(batch: TensorBatch) -> TensorBatch:
    """The batch on the device, with storage of its own."""
    there = cases.with_parts(batch, lambda part: part.to(DEVICE, copy=True))
    for tensor in there.tensors:
        tensor.global_grad = None if tensor.global_grad is None else tensor.global_grad.to(DEVICE)
    return there


def step_on_device(batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor) -> None:
    """One step on the device, its results copied back into the batch."""
    there = moved(batch)
    step.step(there, [grad.to(DEVICE) for grad in grads], table.to(DEVICE))
    for target, source in zip(cases.written(batch), cases.written(there), strict=True):
        target.copy_(source)


def sums_on_device(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    there = sums.to(DEVICE)
    similarity.similarity(moved(batch), [grad.to(DEVICE) for grad in grads], there)
    sums.copy_(there)


def coefficients_on_device(tables: StepScalars, settings: StepSettings, overrides: StepOverrides) -> None:
    there = {name: tensor.to(DEVICE) for name, tensor in vars(tables).items()}
    coefficients.coefficients(StepScalars(**there), settings, overrides)
    for name, tensor in vars(tables).items():
        tensor.copy_(there[name])


def accumulate_on_device(
    totals: list[torch.Tensor], grads: list[torch.Tensor], weight: float, norms: torch.Tensor
) -> None:
    there, there_norms = [total.to(DEVICE, copy=True) for total in totals], norms.to(DEVICE)
    accumulate.accumulate(there, [grad.to(DEVICE) for grad in grads], weight, there_norms)
    for target, source in zip([*totals, norms], [*there, there_norms], strict=True):
        target.copy_(source)


def encode_on_device(tensor: torch.Tensor, format: str) -> Any:
    return quantize.encode(tensor.to(DEVICE), format).to("cpu")


def assert_decodes_every_code(format: str) -> None:
    encoded = agreement.every_code(format)
    assert torch.equal(quantize.decode(encoded.to(DEVICE)).cpu(), reference.decode(encoded))


def checks(tiny: bool) -> dict[str, Any]:
    """Every kernel against the reference, with the comparisons and tolerances of the test suite.

    Every pair of formats, not every combination: each variant is compiled, and the report should take minutes.
    """
    matrix = cases.size_cases()[1:2] if tiny else cases.pairwise_matrix() + cases.size_cases()
    matrix_tensor = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    jobs: dict[str, Callable[[], object]] = {
        "coefficients": lambda: agreement.assert_same_coefficients(
            coefficients_on_device, agreement.BASE, agreement.arguments()
        ),
        "accumulate": lambda: agreement.assert_same_totals(accumulate_on_device, torch.bfloat16),
    }
    for case in matrix:
        jobs[f"step {case}"] = functools.partial(step_agreement.assert_agrees, step_on_device, case)
        jobs[f"sums {case}"] = functools.partial(agreement.assert_same_sums, sums_on_device, case)
    for name in agreement.GROUPED:
        jobs[f"encode {name}"] = functools.partial(
            agreement.assert_same_encoding, encode_on_device, matrix_tensor, name
        )
        jobs[f"decode {name}"] = functools.partial(assert_decodes_every_code, name)
    failures = {}
    for name, job in jobs.items():
        try:
            job()
        except AssertionError as error:
            failures[name] = str(error)
    return {"checked": len(jobs), "failures": failures}

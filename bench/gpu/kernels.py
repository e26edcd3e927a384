"""Every kernel of a step against float64 on the device: all formats, sizes, placements, poisoned memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import ops
from dba_kernels.stepdata import Coefficient, TensorBatch
from tests.support import cases
from tests.support.cases import Case, Misaligned
from tests.support.tolerances import TOLERANCES

from . import exact
from .device import DEVICE, SIMULATED

if TYPE_CHECKING:
    from .report import Report

CHUNK = 8192
SHAPES = ((1, 0), (1, 1), (1, 63), (5, 205), (40, 128), (1, CHUNK - 1), (1, CHUNK), (1, CHUNK + 1), (1, 3 * CHUNK + 5))
SHAPES = (*SHAPES, (33, 777), (96, 1024), (2, 3, 50))
"""Nothing, one element, ragged rows, a chunk and its neighbours, three chunks and 5, rows of full and ragged groups."""
LARGE = (8192, 4096)
"""33.5 M elements: offsets beyond 2²⁴, more chunks than a block sums at once."""
WRONG = "GRAD_WEIGHT", "GLOBAL_WEIGHT", "BETA1", "ONE_MINUS_BETA2", "STEP_SIZE", "EPS", "LR_WEIGHT_DECAY"


def matrix() -> list[Case]:
    """Every pair of formats meets; all sizes in the combinations that people run."""
    return cases.pairwise_matrix() + cases.size_cases()


def poison() -> None:
    """Freed memory must not be right by chance."""
    if not SIMULATED:
        for size in (2**12, 2**16, 2**20, 2**24):
            torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)


def check_step(case: Case, elements: int, wrong: str | None = None) -> None:
    """One step of the case, every tensor ``elements`` past an aligned address, and its margins untouched."""
    place = Misaligned(elements)
    batch, grads, table = cases.build(case, place, DEVICE)
    before = cases.clone(batch)
    poison()
    used = table.clone()
    if wrong is not None:
        used[:, getattr(Coefficient, wrong)] *= 1.01
    ops.step(batch, grads, used, "triton")
    for i, grad in enumerate(grads):
        exact.check_step(batch, i, exact.expected(before, grad, table, i), table)
    place.check()


def check_sums(case: Case, elements: int) -> None:
    """Both sums of every tensor, to the tests' tolerance of the sum of absolute terms; other rows untouched."""
    place = Misaligned(elements)
    batch, grads, table = cases.build(case, place, DEVICE)
    sums = place(torch.full((len(table), 2), float("nan"), dtype=torch.float64, device=DEVICE))
    ops.similarity(batch, grads, sums, "triton")
    rows = batch.all("index")
    for i, grad in enumerate(grads):
        assert_sums(sums[rows[i]], grad, batch.tensors[i].global_grad, f"tensor {i} of {tuple(grad.shape)}")
    for row in set(range(len(table))) - set(rows):
        assert bool(sums[row].isnan().all()), f"sums: row {row} belongs to no tensor and was written"
    place.check()


def assert_sums(got: torch.Tensor, grad: torch.Tensor, encoded: Any, name: str) -> None:
    wide = grad.double()
    stored = exact.stored(encoded) if encoded is not None else torch.zeros_like(wide)
    want = torch.stack(((wide * stored).sum(), wide.square().sum()))
    terms = torch.stack(((wide * stored).abs().sum(), want[1]))
    wrong = ~((got - want).abs() <= TOLERANCES["sum"].bound * terms)
    assert not bool(wrong.any()), f"sums of {name}: got {got.tolist()}, expected {want.tolist()}"


def check_skip(case: Case) -> None:
    """Rows whose SKIP is not 0 stay as they are, whatever their gradient is."""
    batch, grads, table = cases.build(case, device=DEVICE)
    before = cases.clone(batch)
    table[:, Coefficient.SKIP] = 1.0
    for grad in grads:
        grad.fill_(float("nan"))
    ops.step(batch, grads, table, "triton")
    assert same_bits(before, batch), "a skipped step wrote something"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same_bits(one: TensorBatch, other: TensorBatch) -> bool:
    pairs = zip(cases.written(one), cases.written(other), strict=True)
    return all(torch.equal(bits(x), bits(y)) for x, y in pairs)


def check_same_bits(case: Case) -> None:
    """Three runs from the same start give the same bits, sums included."""
    first, grads, table = cases.build(case, device=DEVICE)
    runs = [first, cases.clone(first), cases.clone(first)]
    sums = [torch.full((len(table), 2), -1.0, dtype=torch.float64, device=DEVICE) for _ in runs]
    for batch, its_sums in zip(runs, sums, strict=True):
        ops.similarity(batch, grads, its_sums, "triton")
        ops.step(batch, grads, table, "triton")
    for batch, its_sums in zip(runs[1:], sums[1:], strict=True):
        assert torch.equal(sums[0], its_sums), "sums differ between two runs"
        assert same_bits(runs[0], batch), "a step differs between two runs"


def check_control(case: Case, column: str) -> None:
    """Negative control: one coefficient off by a percent must be noticed."""
    try:
        check_step(case, 0, wrong=column)
    except AssertionError:
        return
    raise AssertionError(f"the comparison does not notice that {column} is off by 1 %")


def check_control_sums(case: Case) -> None:
    """Negative control: a gradient that differs in one element must be noticed."""
    batch, grads, table = cases.build(case, device=DEVICE)
    sums = torch.zeros(len(table), 2, dtype=torch.float64, device=DEVICE)
    ops.similarity(batch, grads, sums, "triton")
    grads[-1].view(-1)[-1] += 1.0
    try:
        assert_sums(sums[batch.tensors[-1].index], grads[-1], batch.tensors[-1].global_grad, "control")
    except AssertionError:
        return
    raise AssertionError("the comparison does not notice another gradient")


def large_cases() -> list[Case]:
    chosen: list[dict[str, Any]] = [
        {"param_dtype": torch.float32, "param_format": "native", "state_format": "fp32", "global_format": "int8"},
        {"param_dtype": torch.bfloat16, "param_format": "split16", "state_format": "int8", "global_format": "int8"},
        {"param_dtype": torch.bfloat16, "param_format": "split8", "state_format": "int8", "global_format": "int4"},
    ]
    shape = (96, 128) if SIMULATED else LARGE
    return [Case(**formats, grad_dtype=torch.bfloat16, shapes=(shape,), seed=7) for formats in chosen]


def run(report: Report) -> None:
    busy = cases.size_cases()
    for case in large_cases():
        report.attempt(f"step, 33 M elements, {case}", check_step, case, 0)
        report.attempt(f"sums, 33 M elements, {case}", check_sums, case, 0)
    for column in WRONG:
        report.attempt(f"control {column}", check_control, busy[1], column)
    report.attempt("control sums", check_control_sums, busy[1])
    for case in (busy[1], busy[3], busy[5]):
        report.attempt(f"skip {case}", check_skip, case)
        report.attempt(f"same bits {case}", check_same_bits, case)
    for k, case in enumerate(matrix()):
        if SIMULATED:  # every pair of formats, on few elements, aligned and misaligned in turn
            report.attempt(f"step {case}", check_step, case, k % 2)
            continue
        flat = case.shapes == cases.FLAT_SIZES
        wide = case if flat else dataclasses.replace(case, shapes=SHAPES)
        for elements in (0, 1, 2):
            report.attempt(f"step {case}, {elements} elements off", check_step, wide, elements)
            report.attempt(f"sums {case}, {elements} elements off", check_sums, wide, elements)

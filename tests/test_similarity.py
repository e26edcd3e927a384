"""similarity and coefficients: every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.reference import quantize
from dba_kernels.reference import similarity as reference

from .cases import FEW_SIZES, FLAT_SIZES, GLOBAL_FORMATS, GRAD_DTYPES, SIZES, Case, Misaligned, build
from .tolerances import TOLERANCES

CASES = [
    Case(torch.float32, "native", "fp32", stored, GRAD_DTYPES[k % 3], FEW_SIZES, seed=k)
    for k, stored in enumerate(GLOBAL_FORMATS)
] + [
    Case(torch.bfloat16, "split16", "int8", "int4", torch.bfloat16, SIZES, seed=10),
    Case(torch.bfloat16, "native", "fp32", "int8", torch.float32, SIZES, seed=11),
    Case(torch.float32, "native", "fp32", "fp32", torch.float32, FLAT_SIZES, seed=12),
]


def sums_of(similarity: object, batch: object, grads: list[torch.Tensor]) -> torch.Tensor:
    sums = torch.full((len(grads) + 2, 2), float("nan"), dtype=torch.float64)
    similarity(batch, grads, sums)
    return sums


def assert_same_sums(similarity: object, case: Case, place: object = torch.clone, mutate: object = None) -> None:
    """Sums within their tolerance of Σ|terms|, rows that belong to no tensor untouched."""
    batch, grads, _ = build(case)
    expected = sums_of(reference.similarity, batch, grads)
    placed, placed_grads, _ = build(case, place)
    if mutate is not None:
        mutate(placed, placed_grads)
    actual = sums_of(similarity, placed, placed_grads)
    written = batch.all("index")
    for row in range(len(actual)):
        if row not in written:
            assert actual[row].isnan().all(), f"row {row} belongs to no tensor and was written"
            continue
        i = written.index(row)
        grad = grads[i].double()
        kept = batch.tensors[i].global_grad
        stored = torch.zeros_like(grad) if kept is None else quantize.decode(kept).double()
        terms = torch.stack(((grad * stored).abs().sum(), grad.square().sum()))
        error = (actual[row] - expected[row]).abs()
        assert (error <= TOLERANCES["sum"].bound * terms).all(), f"row {row}: {actual[row]}, expected {expected[row]}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(backend, case):
    assert_same_sums(backend.similarity, case)


@pytest.mark.parametrize("case", CASES[7:9], ids=str)
def test_misaligned_storage(backend, case):
    place = Misaligned()
    assert_same_sums(backend.similarity, case, place)
    place.check()


def test_same_input_twice_gives_the_same_bits(backend):
    batch, grads, _ = build(CASES[8])
    once, twice = sums_of(backend.similarity, batch, grads), sums_of(backend.similarity, batch, grads)
    assert torch.equal(once.nan_to_num(-1), twice.nan_to_num(-1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient(backend, poison):
    batch, grads, _ = build(CASES[8])
    position = next(i for i, grad in enumerate(grads) if grad.numel() == 1025)
    grads[position].view(-1)[-1] = poison
    finite = torch.isfinite(sums_of(backend.similarity, batch, grads)[batch.all("index"), 1])
    assert finite.tolist() == [i != position for i in range(len(grads))]


def _one_element(batch, grads):
    grads[-1].view(-1)[-1] += 1.0


def _neighbours_scale(batch, grads):
    scales = batch.tensors[-1].global_grad.scales
    scales.copy_(scales.roll(1, dims=1))


@pytest.mark.parametrize("spoil", [_one_element, _neighbours_scale])
def test_control_sums(spoil):
    with pytest.raises(AssertionError):
        assert_same_sums(reference.similarity, CASES[8], mutate=spoil)

"""accumulate: every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.reference import accumulate as reference

from .cases import GRAD_DTYPES, Misaligned, plain, random_tensor
from .tolerances import TOLERANCES, assert_fp32

SHAPES = ((0,), (1,), (63,), (64,), (1023,), (1025,), (), (40, 128), (7, 777))
POISONED = SHAPES.index((1025,))


def tensors(dtype: torch.dtype, place: object = plain) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    totals = [place(random_tensor(shape, generator)) for shape in SHAPES]
    return totals, [place(random_tensor(shape, generator).to(dtype)) for shape in SHAPES]


def assert_agrees(accumulate: object, dtype: torch.dtype, place: object = plain, poison: float | None = None) -> None:
    """Three micro-batches of different weight; the second one has a non-finite element if ``poison`` is given."""
    totals, grads = tensors(dtype)
    expected = [total.clone() for total in totals]
    actual, placed = tensors(dtype, place)
    for k, weight in enumerate((1.0, 0.3, 7.0)):
        if k == 1 and poison is not None:
            grads[POISONED][-1] = placed[POISONED][-1] = poison
        elif poison is not None:
            grads[POISONED][-1] = placed[POISONED][-1] = 1.0
        norms, expected_norms = (torch.full((len(SHAPES),), float("nan"), dtype=torch.float64) for _ in range(2))
        terms = [torch.maximum(t.abs(), weight * g.float().abs()) for t, g in zip(expected, grads, strict=True)]
        reference.accumulate(expected, grads, weight, expected_norms)
        accumulate(actual, placed, weight, norms)
        finite = torch.isfinite(expected_norms)
        assert torch.equal(torch.isfinite(norms), finite)
        assert ((norms - expected_norms).abs()[finite] <= TOLERANCES["sum"].bound * expected_norms[finite]).all()
        for total, want, largest in zip(actual, expected, terms, strict=True):
            assert_fp32("total", total, want, largest.nan_to_num(0.0, posinf=0.0))


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_sums(backend, dtype):
    assert_agrees(backend.accumulate, dtype)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradient_adds_nothing(backend, poison):
    assert_agrees(backend.accumulate, torch.bfloat16, poison=poison)


def test_misaligned_storage(backend):
    place = Misaligned()
    assert_agrees(backend.accumulate, torch.bfloat16, place)
    place.check()


def test_no_tensors(backend):
    backend.accumulate([], [], 1.0, torch.empty(0, dtype=torch.float64))


def test_control_wrong_weight():
    with pytest.raises(AssertionError):
        assert_agrees(lambda t, g, w, n: reference.accumulate(t, g, w * 1.001, n), torch.float32)


def test_control_poison_added():
    def adds_everything(totals, grads, weight, norms):
        reference.accumulate(totals, grads, weight, norms)
        totals[POISONED] += torch.where(norms[POISONED].isfinite(), 0.0, grads[POISONED].nan_to_num(1.0, 1.0) * weight)

    with pytest.raises(AssertionError):
        assert_agrees(adds_everything, torch.float32, poison=float("inf"))

"""accumulate: every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.reference import accumulate as reference

from .support.agreement import POISONED, assert_same_totals
from .support.cases import GRAD_DTYPES, Misaligned


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_sums(backend, dtype):
    """Protects eq. 1: weighted sums of each gradient dtype agree with the reference, and so do the squared norms."""
    assert_same_totals(backend.accumulate, dtype)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradient_adds_nothing(backend, poison):
    """Protects the sums: a micro-batch with a NaN or an infinity is reported and adds nothing to its tensor."""
    assert_same_totals(backend.accumulate, torch.bfloat16, poison=poison)


def test_misaligned_storage(backend):
    """Protects memory: storage that is not aligned gives the same sums, and nothing is written beside it."""
    place = Misaligned()
    assert_same_totals(backend.accumulate, torch.bfloat16, place)
    place.check()


def test_no_tensors(backend):
    """Protects the empty call: no tensors are no work, not an error."""
    backend.accumulate([], [], 1.0, torch.empty(0, dtype=torch.float64))


def test_control_wrong_weight():
    """Negative control: a weight that is off by a thousandth is noticed."""
    with pytest.raises(AssertionError):
        assert_same_totals(lambda t, g, w, n: reference.accumulate(t, g, w * 1.001, n), torch.float32)


def test_control_poison_added():
    """Negative control: adding the finite elements of a poisoned gradient is noticed."""

    def adds_everything(totals, grads, weight, norms):
        reference.accumulate(totals, grads, weight, norms)
        totals[POISONED] += torch.where(norms[POISONED].isfinite(), 0.0, grads[POISONED].nan_to_num(1.0, 1.0) * weight)

    with pytest.raises(AssertionError):
        assert_same_totals(adds_everything, torch.float32, poison=float("inf"))

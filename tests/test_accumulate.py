"""accumulate: every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.reference import accumulate as reference

from .support.agreement import POISONED, assert_same_totals
from .support.cases import GRAD_DTYPES, Misaligned


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_sums(backend, dtype):
    assert_same_totals(backend.accumulate, dtype)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradient_adds_nothing(backend, poison):
    assert_same_totals(backend.accumulate, torch.bfloat16, poison=poison)


def test_misaligned_storage(backend):
    place = Misaligned()
    assert_same_totals(backend.accumulate, torch.bfloat16, place)
    place.check()


def test_no_tensors(backend):
    backend.accumulate([], [], 1.0, torch.empty(0, dtype=torch.float64))


def test_control_wrong_weight():
    with pytest.raises(AssertionError):
        assert_same_totals(lambda t, g, w, n: reference.accumulate(t, g, w * 1.001, n), torch.float32)


def test_control_poison_added():
    def adds_everything(totals, grads, weight, norms):
        reference.accumulate(totals, grads, weight, norms)
        totals[POISONED] += torch.where(norms[POISONED].isfinite(), 0.0, grads[POISONED].nan_to_num(1.0, 1.0) * weight)

    with pytest.raises(AssertionError):
        assert_same_totals(adds_everything, torch.float32, poison=float("inf"))

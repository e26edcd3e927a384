"""similarity: every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.reference import similarity as reference

from .support.agreement import assert_same_sums, sums_of
from .support.cases import FEW_SIZES, FLAT_SIZES, GLOBAL_FORMATS, GRAD_DTYPES, SIZES, Case, Misaligned, build

ODD_SIZES = Case(torch.bfloat16, "split16", "int8", "int4", torch.bfloat16, SIZES, seed=10)
WIDE_GRADS = Case(torch.bfloat16, "native", "fp32", "int8", torch.float32, SIZES, seed=11)
CASES = [
    *(
        Case(torch.float32, "native", "fp32", stored, GRAD_DTYPES[k % 3], FEW_SIZES, seed=k)
        for k, stored in enumerate(GLOBAL_FORMATS)
    ),
    ODD_SIZES,
    WIDE_GRADS,
    Case(torch.float32, "native", "fp32", "fp32", torch.float32, FLAT_SIZES, seed=12),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(backend, case):
    """Protects eq. 4: dot products and norms of every format agree with the reference, other rows stay untouched."""
    assert_same_sums(backend.similarity, case)


@pytest.mark.parametrize("case", [ODD_SIZES, WIDE_GRADS], ids=str)
def test_misaligned_storage(backend, case):
    """Protects memory: storage that is not aligned gives the same sums, and nothing is written beside it."""
    place = Misaligned()
    assert_same_sums(backend.similarity, case, place)
    place.check()


def test_same_input_twice_gives_the_same_bits(backend):
    """Protects repeatability: the reduction has a fixed order."""
    batch, grads, _ = build(WIDE_GRADS)
    once, twice = sums_of(backend.similarity, batch, grads), sums_of(backend.similarity, batch, grads)
    assert torch.equal(once.nan_to_num(-1), twice.nan_to_num(-1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient(backend, poison):
    """Protects the skipped step: a NaN or an infinity shows in the sum of its own tensor, and in no other."""
    batch, grads, _ = build(WIDE_GRADS)
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
    """Negative control: one changed element and one neighbour's scale are noticed."""
    with pytest.raises(AssertionError):
        assert_same_sums(reference.similarity, WIDE_GRADS, mutate=spoil)

"""step: every backend against the reference, over the test matrix."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import triton.language as tl

from dba_kernels.reference import step as reference
from dba_kernels.stepdata import Coefficient

from .support.cases import Case, Misaligned, build, clone, full_matrix, pairwise_matrix, size_cases, written
from .support.step_agreement import assert_agrees

PAIRWISE = pairwise_matrix()
REST = [case for case in full_matrix() if case not in PAIRWISE]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_formats(backend, case):
    """Protects eqs. 3, 7 and 8: every pair of formats steps as the reference does, on each backend."""
    assert_agrees(backend.step, case)


@pytest.mark.parametrize("case", REST, ids=str)
def test_remaining_formats(native, case):
    """Protects eqs. 3, 7 and 8: the combinations that pairs leave out, on the compiled backend."""
    assert_agrees(native.step, case)


@pytest.mark.parametrize("case", size_cases(), ids=str)
def test_sizes(backend, case):
    """Protects ragged ends: empty, tiny, ragged and 1-D tensors step as the reference does."""
    assert_agrees(backend.step, case)


@pytest.mark.parametrize("case", size_cases()[:4], ids=str)
def test_misaligned_storage(backend, case):
    """Protects memory: storage that is not aligned gives the same step, and nothing is written beside it."""
    place = Misaligned()
    assert_agrees(backend.step, case, place)
    place.check()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("case", size_cases()[1:3], ids=str)
def test_skipped_rows_stay_untouched(backend, case):
    """Protects a skipped step: it changes no bit of weights and state, whatever the gradients hold."""
    batch, grads, table = build(case)
    before, stepped = clone(batch), clone(batch)
    skipped = [i for i in range(len(grads)) if i % 2 == 1]
    for i in skipped:
        table[batch.tensors[i].index, Coefficient.SKIP] = 1.0
        grads[i].fill_(float("nan"))
    backend.step(batch, grads, table)
    reference.step(stepped, grads, table)
    for after, original, other in zip(written(batch), written(before), written(stepped), strict=True):
        assert torch.equal(bits(after), bits(original)) == torch.equal(bits(other), bits(original))


def test_production_masked_tile(monkeypatch):
    """The interpreter's masked tiles are larger than a GPU's; here they are not."""
    kernels = importlib.import_module("dba_kernels.kernels.step")
    monkeypatch.setattr(importlib.import_module("dba_kernels.kernels.common"), "MASKED_TILE", tl.constexpr(256))
    place = Misaligned()
    assert_agrees(kernels.step, dataclasses.replace(size_cases()[1], shapes=((5, 205), (20, 64))), place)
    place.check()


DETERMINISTIC = [
    Case(torch.float32, "native", "fp32", "int4", torch.bfloat16, seed=600),
    Case(torch.bfloat16, "split16", "int8", "fp32", torch.bfloat16, seed=123),
    Case(torch.bfloat16, "split8", "int8", "fp16", torch.bfloat16, seed=324),
]
"""Packed codes, int8 moments, and stochastic rounding: what could depend on the order of the work."""


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_same_input_twice_gives_the_same_bits(backend, case):
    """Protects repeatability: stochastic rounding included, the same input gives the same bits."""
    batch, grads, table = build(case)
    again = clone(batch)
    backend.step(batch, grads, table)
    backend.step(again, grads, table)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(written(batch), written(again), strict=True))


# --- negative controls: what the comparison must notice ---------------------------------------------------------------

WRONG_BY_ONE_PERCENT = [
    pytest.param(getattr(Coefficient, name), id=name)
    for name in (
        "GRAD_WEIGHT",
        "GLOBAL_WEIGHT",
        "BETA1",
        "ONE_MINUS_BETA1",
        "BETA2",
        "ONE_MINUS_BETA2",
        "STEP_SIZE",
        "INV_SQRT_BIAS_CORRECTION2",
        "EPS",
        "LR_WEIGHT_DECAY",
    )
]


@pytest.mark.parametrize("column", WRONG_BY_ONE_PERCENT)
@pytest.mark.parametrize("case", size_cases()[:2], ids=str)
def test_control_wrong_coefficient(case, column):
    """Negative control: each coefficient that is off by a hundredth is noticed."""

    def spoil(batch, table):
        table[batch.tensors[-1].index, column] *= 1.01

    with pytest.raises(AssertionError):
        assert_agrees(reference.step, case, mutate=spoil)


def _other_seed(batch, table):
    for tensor in batch.tensors:
        tensor.seed += 1


def _other_offset(batch, table):
    for tensor in batch.tensors:
        tensor.offset += 64


def _other_step(batch, table):
    table[:, Coefficient.STEP] += 1


def _shifted_rows(batch, table):
    for tensor in batch.tensors:
        tensor.index -= 1


def _swapped_nibbles(batch, table):
    last = batch.tensors[-1]
    codes = last.exp_avg if last.global_grad is None else last.global_grad.codes
    codes.copy_(codes.roll(1, dims=-1))


@pytest.mark.parametrize("spoil", [_other_seed, _other_offset, _other_step, _shifted_rows, _swapped_nibbles])
def test_control_wrong_batch(spoil):
    """Negative control: another seed, offset or step, shifted rows and swapped nibbles are noticed."""
    with pytest.raises(AssertionError):
        assert_agrees(reference.step, size_cases()[2], mutate=spoil)


def test_control_write_outside():
    """Negative control: a write one element past the end is noticed."""
    place = Misaligned()
    tensor = place(torch.zeros(8))
    torch.as_strided(tensor, (9,), (1,))[8] = 1.0
    with pytest.raises(AssertionError, match="left its tensor"):
        place.check()

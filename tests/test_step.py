"""step: every backend against the reference, over the test matrix."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import triton.language as tl

from dba_kernels.reference import quantize, remainder
from dba_kernels.reference import step as reference
from dba_kernels.stepdata import Coefficient, TensorBatch

from .cases import Case, Misaligned, build, clone, full_matrix, pairwise_matrix, size_cases, written
from .tolerances import (
    FP16_SPLIT16_FLOOR,
    NARROW_STEP,
    SPLIT8_STEP,
    assert_codes,
    assert_fp32,
    assert_narrow,
)

PAIRWISE = pairwise_matrix()
REST = [case for case in full_matrix() if case not in PAIRWISE]


def largest_terms(
    batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor, i: int
) -> dict[str, torch.Tensor]:
    """fp64 magnitude of the largest term that enters each result of tensor ``i``, before the step is taken."""
    tensor = batch.tensors[i]
    row = table[tensor.index]
    exp_avg, exp_avg_sq = (x.double() for x in reference.load_state(tensor, batch.state_format, torch.float32))
    param = reference.load_param(tensor, batch.param_format, torch.float32).double()
    grad = row[Coefficient.GRAD_WEIGHT] * grads[i].double()
    kept = tensor.global_grad
    stored = torch.zeros_like(grad) if kept is None else quantize.decode(kept).double()
    stored = row[Coefficient.GLOBAL_WEIGHT] * stored
    beta1, rest1 = row[Coefficient.BETA1], row[Coefficient.ONE_MINUS_BETA1]
    beta2, rest2 = row[Coefficient.BETA2], row[Coefficient.ONE_MINUS_BETA2]
    m, v = beta1 * exp_avg + rest1 * (grad + stored), beta2 * exp_avg_sq + rest2 * (grad + stored).square()
    m_largest = torch.stack((beta1 * exp_avg, rest1 * grad, rest1 * stored, m)).abs().amax(0)
    v_largest = torch.stack((rest2 * grad.square(), rest2 * stored.square(), v)).amax(0)
    denominator = v.sqrt() * row[Coefficient.INV_SQRT_BIAS_CORRECTION2] + row[Coefficient.EPS]
    cancellation = (v_largest / v).nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
    update = row[Coefficient.STEP_SIZE] * m_largest / denominator * cancellation
    return {"exp_avg": m_largest, "exp_avg_sq": v_largest, "param": torch.maximum(param.abs(), update)}


def assert_same_state(actual: TensorBatch, expected: TensorBatch, i: int, terms: dict[str, torch.Tensor]) -> None:
    """The moments of tensor ``i``, within the table of tolerances."""
    for name, largest in (("exp_avg", terms["exp_avg"]), ("exp_avg_sq", terms["exp_avg_sq"])):
        got, want = (getattr(batch.tensors[i], name) for batch in (actual, expected))
        if actual.state_format == "fp32":
            assert_fp32(name, got, want, largest)
        elif actual.state_format == "bf16":
            assert_narrow(name, got, want, largest, NARROW_STEP[torch.bfloat16])
        else:
            scale, want_scale = (getattr(batch.tensors[i], name + "_scale") for batch in (actual, expected))
            assert_fp32(name + "_scale", scale, want_scale, 2 * want_scale)
            assert_codes(name, got, want)


def assert_same_param(actual: TensorBatch, expected: TensorBatch, i: int, largest: torch.Tensor) -> None:
    """The parameter of tensor ``i``, joined with its remainder."""
    kind = actual.param_format
    weight, want_weight = actual.tensors[i].param, expected.tensors[i].param
    dtype = weight.dtype
    if kind == "native":
        got, want = weight, want_weight
        if dtype == torch.float32:
            assert_fp32("param", got, want, largest)
        else:
            assert_narrow("param", got, want, largest, NARROW_STEP[dtype])
        return
    got, want = (remainder.join(b.tensors[i].param, b.tensors[i].remainder, kind) for b in (actual, expected))
    if kind == "split8":
        assert_narrow("param", got, want, largest, SPLIT8_STEP[dtype], share="random")
    else:
        floor = FP16_SPLIT16_FLOOR if (kind, dtype) == ("split16", torch.float16) else 2.0**-126
        assert_fp32("param", got, want, largest, floor)
    assert_narrow("weight", weight, want_weight, largest, NARROW_STEP[dtype])


def assert_agrees(step: object, case: Case, place: object = torch.clone, mutate: object = None) -> None:
    """Take one step with the reference and one with ``step``, from the same state, and compare everything written.

    ``mutate`` may spoil the second run's batch or table: the negative controls.
    """
    expected, grads, table = build(case)
    batch, same_grads, same_table = build(case, place)
    terms = [largest_terms(expected, grads, table, i) for i in range(len(grads))]
    reference.step(expected, grads, table)
    if mutate is not None:
        mutate(batch, same_table)
    step(batch, same_grads, same_table)
    for i, term in enumerate(terms):
        assert_same_state(batch, expected, i, term)
        assert_same_param(batch, expected, i, term["param"])


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_formats(backend, case):
    assert_agrees(backend.step, case)


@pytest.mark.parametrize("case", REST, ids=str)
def test_remaining_formats(native, case):
    assert_agrees(native.step, case)


@pytest.mark.parametrize("case", size_cases(), ids=str)
def test_sizes(backend, case):
    assert_agrees(backend.step, case)


@pytest.mark.parametrize("case", size_cases()[:4], ids=str)
def test_misaligned_storage(backend, case):
    place = Misaligned()
    assert_agrees(backend.step, case, place)
    place.check()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("case", size_cases()[1:3], ids=str)
def test_skipped_rows_stay_untouched(backend, case):
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
    for module in (kernels, importlib.import_module("dba_kernels.kernels.common")):
        monkeypatch.setattr(module, "MASKED_TILE", tl.constexpr(256))
    place = Misaligned()
    assert_agrees(kernels.step, dataclasses.replace(size_cases()[1], shapes=((5, 205), (20, 64))), place)
    place.check()


@pytest.mark.parametrize("case", [PAIRWISE[2], PAIRWISE[26], PAIRWISE[33]], ids=str)
def test_same_input_twice_gives_the_same_bits(backend, case):
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
    with pytest.raises(AssertionError):
        assert_agrees(reference.step, size_cases()[2], mutate=spoil)


def test_control_write_outside():
    place = Misaligned()
    tensor = place(torch.zeros(8))
    torch.as_strided(tensor, (9,), (1,))[8] = 1.0
    with pytest.raises(AssertionError, match="left its tensor"):
        place.check()

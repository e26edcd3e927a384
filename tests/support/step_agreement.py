"""One step of a backend, compared with the reference's from the same state: weights, remainders, moments, scales."""

from __future__ import annotations

import torch

from dba_kernels.reference import quantize, remainder
from dba_kernels.reference import step as reference
from dba_kernels.stepdata import Coefficient, TensorBatch

from .cases import Case, build
from .tolerances import FP16_SPLIT16_FLOOR, NARROW_STEP, SPLIT8_STEP, assert_codes, assert_fp32, assert_narrow


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
    kind, weight, want_weight = actual.param_format, actual.tensors[i].param, expected.tensors[i].param
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

"""The coefficient table of a step, from the sums of its reduction: one program (eqs. 2, 4, 5).

Everything here is a scalar per parameter, in float64: the step's precision is decided by its per-element arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import formats
from ..stepdata import NO_OVERRIDES, StepOverrides, StepScalars, StepSettings
from . import columns as col
from .common import LAUNCH, WARP
from .tables import on_device

SQUARED_NORM_LIMIT = tl.constexpr(formats.SQUARED_NORM_LIMIT)
MOST_PARAMS = 1024
"""Parameters that the program takes at a time: most models need one turn of each of its two loops."""


@triton.jit
def clamp(x, low: tl.constexpr, high: tl.constexpr):
    """float64 ``x`` in [low, high]; NaN stays NaN, as in torch."""
    least, most = tl.full((), low, tl.float64), tl.full((), high, tl.float64)
    return tl.where(x < least, least, tl.where(x > most, most, x))


@triton.jit
def ratio(x, y):
    """x / y where y > 0, else 0."""
    return tl.where(y > 0, x / tl.where(y > 0, y, 1.0), 0.0)


@triton.jit
def load_scalar(ptr, default: tl.constexpr):
    """float64 value of an optional one-element tensor."""
    if ptr is None:
        return tl.full((), default, tl.float64)
    else:
        return tl.load(ptr).to(tl.float64)


@triton.jit
def load_params(
    first,
    n_active,
    active_ptr,
    group_ptr,
    hyper_ptr,
    global_sq_ptr,
    sums_ptr,
    scale,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per active parameter: mask, row, its hyperparameters' row, (dot, ‖g_D‖²) unscaled, 1 where ‖g_D‖² is NaN or too
    large, ‖ĝ_G‖² or −1, 1/scale."""
    i = first + tl.arange(0, BLOCK)
    inside = i < n_active
    row = tl.load(active_ptr + i, mask=inside, other=0)
    hyper = hyper_ptr + tl.load(group_ptr + row, mask=inside, other=0) * col.HYPERS
    stored_sq = tl.load(global_sq_ptr + row, mask=inside, other=-1.0)
    inverse_scale = tl.load(hyper + col.HYPER_SIGN, mask=inside, other=0.0) / scale
    dot = tl.zeros((BLOCK,), tl.float64)
    grad_sq = tl.zeros((BLOCK,), tl.float64)
    unusable = tl.zeros((BLOCK,), tl.float64)
    if REDUCE:
        dot = tl.load(sums_ptr + 2 * row, mask=inside, other=0.0) * inverse_scale
        raw_sq = tl.load(sums_ptr + 2 * row + 1, mask=inside, other=0.0)
        grad_sq = raw_sq * (inverse_scale * inverse_scale)
        unusable = tl.where((raw_sq <= SQUARED_NORM_LIMIT) & (grad_sq <= SQUARED_NORM_LIMIT), 0.0, 1.0)
    return inside, row, hyper, dot, grad_sq, unusable, stored_sq, inverse_scale


@triton.jit
def model_sums(
    n_active,
    active_ptr,
    group_ptr,
    hyper_ptr,
    global_sq_ptr,
    sums_ptr,
    scale,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over the active parameters: ‖g_D‖², how many gradients are unusable; over those of them that have a global
    gradient: ⟨g_D, ĝ_G⟩, ‖g_D‖², ‖ĝ_G‖²."""
    zero = tl.zeros((), tl.float64)
    total_sq, n_unusable, scope_dot, scope_grad_sq, scope_sq = zero, zero, zero, zero, zero
    for first in range(0, n_active, BLOCK):
        _, _, _, dot, grad_sq, unusable, stored_sq, _ = load_params(
            first, n_active, active_ptr, group_ptr, hyper_ptr, global_sq_ptr, sums_ptr, scale, REDUCE, BLOCK
        )
        has_global = stored_sq >= 0
        total_sq += tl.sum(grad_sq)
        n_unusable += tl.sum(unusable)
        scope_dot += tl.sum(tl.where(has_global, dot, 0.0))
        scope_grad_sq += tl.sum(tl.where(has_global, grad_sq, 0.0))
        scope_sq += tl.sum(tl.where(has_global, stored_sq, 0.0))
    return total_sq, n_unusable, scope_dot, scope_grad_sq, scope_sq


@triton.jit
def correction_weights(
    dot, grad_sq, stored_sq, gamma, alpha, CORRECTION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """(φ, a, b, α) of ``a·g_D + b·ĝ_G`` and its update; ``alpha`` holds α where the caller gives it."""
    cosine = clamp(ratio(dot, tl.sqrt(grad_sq) * tl.sqrt(stored_sq)), -1.0, 1.0)  # eq. 4
    a, b = 1.0 - gamma, gamma
    conflict = tl.where(dot > 0, 0.0, dot)
    if CORRECTION == "agem":
        a, b = tl.full((), 1.0, tl.float64), -ratio(conflict, stored_sq)
    elif CORRECTION == "pcgrad":
        a, b = 1.0 - ratio(conflict, grad_sq), 1.0 - ratio(conflict, stored_sq)
    elif CORRECTION == "cosine":
        alpha = clamp(1.0 - cosine, LOW, HIGH)  # eq. 5
    return cosine, a, b, alpha


@triton.jit
def count_step(steps_ptr, bias_ptr, hyper, row, inside, skip):
    """Advance k and 1 − β^k of every parameter, (k, β₁, β₂, 1 − β₁^k, 1 − β₂^k); a skipped step counts nowhere."""
    k = tl.load(steps_ptr + row, mask=inside, other=0.0) + tl.where(skip, 0.0, 1.0)
    tl.store(steps_ptr + row, k, mask=inside)
    beta1 = tl.load(hyper + col.HYPER_BETA1, mask=inside, other=0.0)
    beta2 = tl.load(hyper + col.HYPER_BETA2, mask=inside, other=0.0)
    bias1 = tl.load(bias_ptr + 2 * row, mask=inside, other=1.0)
    bias2 = tl.load(bias_ptr + 2 * row + 1, mask=inside, other=1.0)
    bias1 = tl.where(skip, bias1, beta1 * bias1 + (1.0 - beta1))
    bias2 = tl.where(skip, bias2, beta2 * bias2 + (1.0 - beta2))
    tl.store(bias_ptr + 2 * row, bias1, mask=inside)
    tl.store(bias_ptr + 2 * row + 1, bias2, mask=inside)
    return k, beta1, beta2, bias1, bias2


@triton.jit
def write_row(table_ptr, steps_ptr, bias_ptr, hyper, row, inside, skip, grad_weight, global_weight, alpha):
    """The table's entries of these parameters, whose step is counted."""
    k, beta1, beta2, bias1, bias2 = count_step(steps_ptr, bias_ptr, hyper, row, inside, skip)
    lr = tl.load(hyper + col.HYPER_LR, mask=inside, other=0.0)
    weight_decay = tl.load(hyper + col.HYPER_WEIGHT_DECAY, mask=inside, other=0.0)
    entry = table_ptr + row * col.COEFFICIENTS
    tl.store(entry + col.GRAD_WEIGHT, grad_weight, mask=inside)
    tl.store(entry + col.GLOBAL_WEIGHT, global_weight, mask=inside)
    tl.store(entry + col.BETA1, beta1, mask=inside)
    tl.store(entry + col.ONE_MINUS_BETA1, 1.0 - beta1, mask=inside)
    tl.store(entry + col.BETA2, beta2, mask=inside)
    tl.store(entry + col.ONE_MINUS_BETA2, 1.0 - beta2, mask=inside)
    tl.store(entry + col.STEP_SIZE, lr * alpha / bias1, mask=inside)
    tl.store(entry + col.INV_SQRT_BIAS_CORRECTION2, 1.0 / tl.sqrt(bias2), mask=inside)
    tl.store(entry + col.EPS, tl.load(hyper + col.HYPER_EPS, mask=inside, other=0.0), mask=inside)
    tl.store(entry + col.LR_WEIGHT_DECAY, lr * weight_decay, mask=inside)
    tl.store(entry + col.STEP, k.to(tl.float64), mask=inside)
    tl.store(entry + col.SKIP, tl.where(skip, 1.0, 0.0), mask=inside)


@triton.jit(do_not_specialize=["n_active"])
def coefficients_kernel(
    table_ptr,
    steps_ptr,
    bias_ptr,
    counters_ptr,
    report_ptr,
    summary_ptr,
    sums_ptr,
    global_sq_ptr,
    hyper_ptr,
    group_ptr,
    active_ptr,
    loss_scale_ptr,
    found_inf_ptr,
    gamma_ptr,
    alpha_ptr,
    n_active,
    BOOST: tl.constexpr,
    TOTAL_STEPS: tl.constexpr,
    BOOST_MAX: tl.constexpr,
    CORRECTION: tl.constexpr,
    GLOBAL_SCOPE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MAX_GRAD_NORM: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All scalars of a step, in float64, by one program: a first pass over the parameters sums, a second one writes."""
    steps_done = tl.load(counters_ptr)  # the reductions below are barriers between this read and the write at the end
    steps_skipped = tl.load(counters_ptr + 1)
    scale = load_scalar(loss_scale_ptr, 1.0)
    total_sq, n_unusable, scope_dot, scope_grad_sq, scope_sq = model_sums(
        n_active, active_ptr, group_ptr, hyper_ptr, global_sq_ptr, sums_ptr, scale, REDUCE, BLOCK
    )
    skip = (load_scalar(found_inf_ptr, 0.0) != 0) | (n_unusable > 0)
    grad_norm = tl.sqrt(total_sq)
    factor = tl.full((), 1.0, tl.float64)
    if MAX_GRAD_NORM is not None:
        factor = clamp(MAX_GRAD_NORM / (grad_norm + 1e-6), 0.0, 1.0)
    gamma = tl.full((), 0.0, tl.float64)
    if gamma_ptr is not None:
        gamma = load_scalar(gamma_ptr, 0.0)
    elif TOTAL_STEPS > 0:
        gamma = clamp(BOOST * (1.0 - steps_done.to(tl.float64) / TOTAL_STEPS), 0.0, BOOST_MAX)  # eq. 2

    for first in range(0, n_active, BLOCK):
        inside, row, hyper, dot, grad_sq, _, stored_sq, inverse_scale = load_params(
            first, n_active, active_ptr, group_ptr, hyper_ptr, global_sq_ptr, sums_ptr, scale, REDUCE, BLOCK
        )
        has_global = stored_sq >= 0
        stored_sq = tl.where(has_global, stored_sq, 0.0)
        if GLOBAL_SCOPE:
            dot, grad_sq, stored_sq = scope_dot, scope_grad_sq, scope_sq
        alpha = tl.full((), 1.0, tl.float64)
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + row, mask=inside, other=1.0).to(tl.float64)
        FORMULA: tl.constexpr = "none" if alpha_ptr is not None and CORRECTION == "cosine" else CORRECTION
        cosine, a, b, alpha = correction_weights(
            dot * factor, grad_sq * (factor * factor), stored_sq, gamma, alpha, FORMULA, LOW, HIGH
        )
        a, alpha = tl.where(has_global, a, 1.0), tl.where(has_global, alpha, 1.0)
        b, cosine = tl.where(has_global, b, 0.0), tl.where(has_global, cosine, 0.0)
        write_row(table_ptr, steps_ptr, bias_ptr, hyper, row, inside, skip, a * factor * inverse_scale, b, alpha)
        tl.store(report_ptr + 2 * row, cosine, mask=inside)
        tl.store(report_ptr + 2 * row + 1, alpha, mask=inside)

    skipped = skip.to(tl.int64)
    tl.store(counters_ptr, steps_done + 1 - skipped)
    tl.store(counters_ptr + 1, steps_skipped + skipped)
    tl.store(summary_ptr + col.GAMMA, gamma)
    tl.store(summary_ptr + col.CLIP_FACTOR, factor)
    tl.store(summary_ptr + col.GRAD_NORM, grad_norm)
    tl.store(summary_ptr + col.GLOBAL_NORM, tl.sqrt(scope_sq))


def block(n_active: int) -> dict[str, Any]:
    """The kernel's block and launch options for this many parameters: as few turns, and as few threads, as will do."""
    size = min(MOST_PARAMS, max(2 * WARP, triton.next_power_of_2(n_active)))
    return {"BLOCK": size, **LAUNCH, "num_warps": size // (2 * WARP)}  # two parameters per thread


@torch.no_grad()
def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides = NO_OVERRIDES) -> None:
    """Turn the sums into coefficients, and count the step.

    Order: unscale → clip by ‖g_D‖ → boost → moments → corrected update. With a non-finite ‖g_D‖² among the active
    parameters, or ``found_inf`` not 0, the step is skipped: nothing is counted but the skip.

    Args:
        scalars: ``sums`` is read where ``settings.reduce``; ``coefficients``, ``report``, ``steps`` and
            ``bias_corrections`` are written where active, ``counters`` and ``summary`` always.
        settings: compiled into the kernel: one compilation per run.
    """
    with on_device(scalars.coefficients):
        coefficients_kernel[(1,)](
            scalars.coefficients,
            scalars.steps,
            scalars.bias_corrections,
            scalars.counters,
            scalars.report,
            scalars.summary,
            scalars.sums,
            scalars.global_sq,
            scalars.hyper,
            scalars.group,
            scalars.active,
            overrides.loss_scale,
            overrides.found_inf,
            overrides.gamma,
            overrides.alpha,
            scalars.active.numel(),
            BOOST=float(settings.boost),
            TOTAL_STEPS=float(settings.total_steps),
            BOOST_MAX=float(settings.boost_max),
            CORRECTION=settings.correction,
            GLOBAL_SCOPE=settings.scope == "global",
            LOW=float(settings.bounds[0]),
            HIGH=float(settings.bounds[1]),
            MAX_GRAD_NORM=settings.max_grad_norm,
            REDUCE=settings.reduce,
            **block(scalars.active.numel()),
        )

"""The coefficients of a step, from the sums of its reduction (eqs. 2, 4, 5).

Everything here is a scalar per parameter, in float64: the step's precision is decided by its per-element arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import SQUARED_NORM_LIMIT
from ..stepdata import NO_OVERRIDES, PROJECTIONS, Coefficient, Hyper, StepOverrides, StepScalars, StepSettings, Summary


def gamma(step: torch.Tensor, settings: StepSettings) -> torch.Tensor:
    """γ_t = k₀ · (1 − t/T), clamped to [0, boost_max]  (eq. 2); 0 for t ≥ T."""
    if settings.total_steps == 0:
        return torch.zeros_like(step, dtype=torch.float64)
    remaining = 1.0 - step.double() / settings.total_steps
    return (settings.boost * remaining).clamp(0.0, settings.boost_max)


def cosine(dot: torch.Tensor, grad_sq: torch.Tensor, global_sq: torch.Tensor) -> torch.Tensor:
    """φ_t = ⟨g_D, ĝ_G⟩ / (‖g_D‖ ‖ĝ_G‖), in [−1, 1]; 0 if either norm is 0  (eq. 4)."""
    norms = grad_sq.sqrt() * global_sq.sqrt()
    return torch.where(norms > 0, dot / norms, torch.zeros_like(dot)).clamp(-1.0, 1.0)


def correction(cosine: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """α_t = 1 − φ_t, clamped to [α_min, α_max]  (eq. 5: our reading of the paper's eq. 9)."""
    return (1.0 - cosine).clamp(*bounds)


def clip_factor(grad_norm: torch.Tensor, max_grad_norm: float | None) -> torch.Tensor:
    """min(1, max_grad_norm / (‖g_D‖ + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``."""
    if max_grad_norm is None:
        return torch.ones_like(grad_norm)
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)


def projection_weights(
    mode: str, dot: torch.Tensor, grad_sq: torch.Tensor, global_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of ``a·g_D + b·ĝ_G`` for the projections, with conflict = min(⟨g_D, ĝ_G⟩, 0).

    ``"agem"``: a = 1, b = −conflict/‖ĝ_G‖². ``"pcgrad"`` (two tasks): a = 1 − conflict/‖g_D‖², b = 1 − conflict/‖ĝ_G‖².
    The originals recompute the reference gradient at every step; here it is the stored ĝ_G.
    """
    conflict = dot.clamp(max=0.0)
    onto_global = torch.where(global_sq > 0, conflict / global_sq, torch.zeros_like(dot))
    if mode == "agem":
        return torch.ones_like(dot), -onto_global
    onto_grad = torch.where(grad_sq > 0, conflict / grad_sq, torch.zeros_like(dot))
    return 1.0 - onto_grad, 1.0 - onto_global


@dataclass
class Sums:
    """The sums of the active parameters, unscaled and clipped.

    Args:
        dot, grad_sq: ⟨g_D, ĝ_G⟩ and ‖g_D‖², ``[m]``.
        grad_norm: ‖g_D‖ over all of them, before clipping.
        factor: the clip factor.
        skip: whether one of them, or ``found_inf``, forbids the step.
    """

    dot: torch.Tensor
    grad_sq: torch.Tensor
    grad_norm: torch.Tensor
    factor: torch.Tensor
    skip: torch.Tensor


def unscaled_and_clipped(
    scalars: StepScalars, settings: StepSettings, inverse_scale: torch.Tensor, found_inf: torch.Tensor | None
) -> Sums:
    """Skip and clip: both by the norm of g_D over everything active."""
    zero = scalars.coefficients.new_zeros(())
    none = zero.expand(len(scalars.active))
    sums = Sums(none, none, zero, zero + 1.0, torch.zeros_like(zero, dtype=torch.bool))
    if settings.reduce:
        dot, raw_sq = scalars.sums[scalars.active].unbind(1)
        dot, grad_sq = dot * inverse_scale, raw_sq * inverse_scale.square()
        usable = (raw_sq <= SQUARED_NORM_LIMIT) & (grad_sq <= SQUARED_NORM_LIMIT)  # false for NaN
        sums.skip = ~usable.all()
        sums.grad_norm = grad_sq.sum().sqrt()
        sums.factor = clip_factor(sums.grad_norm, settings.max_grad_norm)
        sums.dot, sums.grad_sq = dot * sums.factor, grad_sq * sums.factor.square()
    if found_inf is not None:
        sums.skip = sums.skip | (found_inf.double() != 0).any()
    return sums


def weights(
    sums: Sums,
    global_sq: torch.Tensor,
    has_global: torch.Tensor,
    gamma_t: torch.Tensor,
    settings: StepSettings,
    alpha: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(φ, a, b, α) of ``g' = a·g_D + b·ĝ_G`` and its update; plain AdamW where there is no ĝ_G.

    Args:
        global_sq: ‖ĝ_G‖² of the active parameters, 0 without one.
        has_global: whether they have one.
        alpha: α of the active parameters where the caller gives it.
    """
    dot, grad_sq, scope_sq = sums.dot, sums.grad_sq, global_sq
    if settings.scope == "global":  # over all tensors that have a global gradient
        dot, grad_sq, scope_sq = (torch.where(has_global, x, 0.0).sum().expand_as(x) for x in (dot, grad_sq, scope_sq))
    phi = cosine(dot, grad_sq, scope_sq)  # eq. 4
    one = torch.ones_like(phi)
    a, b = 1.0 - gamma_t.expand_as(phi), gamma_t.expand_as(phi)
    if settings.correction in PROJECTIONS:
        a, b = projection_weights(settings.correction, dot, grad_sq, scope_sq)
        alpha = one
    elif alpha is None:
        alpha = correction(phi, settings.bounds) if settings.correction == "cosine" else one  # eq. 5
    a, alpha = torch.where(has_global, a, one), torch.where(has_global, alpha.double(), one)
    return torch.where(has_global, phi, 0.0), a, torch.where(has_global, b, 0.0), alpha


def count_step(scalars: StepScalars, hyper: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Advance t, every k and its 1 − β^k, c ← βc + (1−β); a skipped step counts nowhere. Returns ``[m, 2]`` of c."""
    active = scalars.active
    scalars.counters.add_(torch.stack((~skip, skip)))
    scalars.steps[active] += (~skip).to(scalars.steps.dtype)
    betas = hyper[:, [Hyper.BETA1, Hyper.BETA2]]
    bias = scalars.bias_corrections[active]
    scalars.bias_corrections[active] = torch.where(skip, bias, betas * bias + (1.0 - betas))
    return scalars.bias_corrections[active]


def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides = NO_OVERRIDES) -> None:
    """Turn the sums into coefficients, and count the step.

    Order: unscale → clip by ‖g_D‖ → boost → moments → corrected update. With a non-finite ‖g_D‖² among the active
    parameters, or ``found_inf`` not 0, the step is skipped: nothing is counted but the skip.

    Args:
        scalars: ``sums`` is read where ``settings.reduce``; ``coefficients``, ``report``, ``steps`` and
            ``bias_corrections`` are written where active, ``counters`` and ``summary`` always.
    """
    active = scalars.active
    h = scalars.hyper[scalars.group[active]]
    inverse_scale = h[:, Hyper.SIGN] / (1.0 if overrides.loss_scale is None else overrides.loss_scale.double())
    has_global = scalars.global_sq[active] >= 0
    global_sq = scalars.global_sq[active].clamp(min=0.0)
    sums = unscaled_and_clipped(scalars, settings, inverse_scale, overrides.found_inf)
    gamma_t = gamma(scalars.counters[0], settings) if overrides.gamma is None else overrides.gamma.double()  # eq. 2
    given = None if overrides.alpha is None else overrides.alpha[active]
    phi, a, b, alpha = weights(sums, global_sq, has_global, gamma_t, settings, given)
    bias = count_step(scalars, h, sums.skip)

    row = torch.empty(len(active), Coefficient.COUNT, dtype=torch.float64, device=scalars.coefficients.device)
    row[:, Coefficient.GRAD_WEIGHT] = a * sums.factor * inverse_scale
    row[:, Coefficient.GLOBAL_WEIGHT] = b
    row[:, Coefficient.BETA1] = h[:, Hyper.BETA1]
    row[:, Coefficient.ONE_MINUS_BETA1] = 1.0 - h[:, Hyper.BETA1]
    row[:, Coefficient.BETA2] = h[:, Hyper.BETA2]
    row[:, Coefficient.ONE_MINUS_BETA2] = 1.0 - h[:, Hyper.BETA2]
    row[:, Coefficient.STEP_SIZE] = h[:, Hyper.LR] * alpha / bias[:, 0]
    row[:, Coefficient.INV_SQRT_BIAS_CORRECTION2] = bias[:, 1].rsqrt()
    row[:, Coefficient.EPS] = h[:, Hyper.EPS]
    row[:, Coefficient.LR_WEIGHT_DECAY] = h[:, Hyper.LR] * h[:, Hyper.WEIGHT_DECAY]
    row[:, Coefficient.STEP] = scalars.steps[active].double()
    row[:, Coefficient.SKIP] = sums.skip.double()
    scalars.coefficients[active] = row
    scalars.report[active] = torch.stack((phi, alpha), dim=1)
    scalars.summary[Summary.GAMMA] = gamma_t
    scalars.summary[Summary.CLIP_FACTOR] = sums.factor
    scalars.summary[Summary.GRAD_NORM] = sums.grad_norm
    scalars.summary[Summary.GLOBAL_NORM] = global_sq.sum().sqrt()

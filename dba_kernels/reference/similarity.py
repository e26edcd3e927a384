"""The read-only reduction before an update, and the coefficients that follow from it (README eqs. 2, 4, 5).

Everything here that is a scalar is computed in float64: the step's precision is decided by its per-element arithmetic.
"""

from __future__ import annotations

import torch

from ..formats import SQUARED_NORM_LIMIT, Coefficient, Hyper, StepSettings, StepTables, Summary, TensorBatch
from .quantize import decode


def reduce_one(grad: torch.Tensor, global_grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² (float64 scalars); the dot is 0 without a global gradient."""
    wide = grad.double()
    dot = wide.new_zeros(()) if global_grad is None else (wide * global_grad.double()).sum()
    return dot, wide.square().sum()


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    """Write ⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch to its rows of ``sums`` (float64 ``[n_params, 2]``).

    The gradients are taken as they are: not unscaled, not clipped, not negated. A NaN or an infinity in a gradient
    makes its ‖g_D‖² non-finite.
    """
    stored = batch.global_grads or [None] * len(grads)
    for row, grad, global_grad in zip(batch.index.tolist(), grads, stored, strict=True):
        sums[row, 0], sums[row, 1] = reduce_one(grad, None if global_grad is None else decode(global_grad))


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


def coefficients(
    tables: StepTables,
    settings: StepSettings,
    *,
    loss_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    gamma_override: torch.Tensor | None = None,
    alpha_override: torch.Tensor | None = None,
) -> None:
    """Turn the sums into the coefficient table, and count the step.

    Order: unscale → clip by ‖g_D‖ → boost → moments → corrected update. With a non-finite ‖g_D‖² among the active
    parameters, or ``found_inf`` not 0, the step is skipped: nothing is counted but the skip.

    Args:
        tables: ``sums`` is read where ``settings.reduce``; ``table``, ``report``, ``steps`` and ``bias_corrections``
            are written where active, ``counters`` and ``summary`` always.
        loss_scale: scalar by which the gradients are too large; None for 1.
        found_inf: scalar, not 0 to skip.
        gamma_override: scalar γ_t in place of eq. 2.
        alpha_override: ``[n]`` α_t in place of eq. 5.
    """
    active, table = tables.active, tables.table
    h = tables.hyper[tables.group[active]]
    inverse_scale = h[:, Hyper.SIGN] / (1.0 if loss_scale is None else loss_scale.double())
    stored_sq = tables.global_sq[active]
    has_global = stored_sq >= 0
    stored_sq = stored_sq.clamp(min=0.0)

    # Skip and clip: both by the norm of g_D over everything active.
    skip = torch.zeros((), dtype=torch.bool, device=table.device)
    factor = torch.ones((), dtype=torch.float64, device=table.device)
    dot = grad_sq = torch.zeros_like(stored_sq)
    grad_norm = torch.zeros_like(factor)
    if settings.reduce:
        raw_sq = tables.sums[active, 1]
        dot, grad_sq = tables.sums[active, 0] * inverse_scale, tables.sums[active, 1] * inverse_scale.square()
        usable = (raw_sq <= SQUARED_NORM_LIMIT) & (grad_sq <= SQUARED_NORM_LIMIT)  # false for NaN
        skip = ~usable.all()
        grad_norm = grad_sq.sum().sqrt()
        factor = clip_factor(grad_norm, settings.max_grad_norm)
        dot, grad_sq = dot * factor, grad_sq * factor.square()
    if found_inf is not None:
        skip = skip | (found_inf.double() != 0).any()

    # Similarity, per tensor or over all tensors that have a global gradient.
    if settings.scope == "global":
        dot, grad_sq, scope_sq = (torch.where(has_global, x, 0.0).sum().expand_as(x) for x in (dot, grad_sq, stored_sq))
    else:
        scope_sq = stored_sq
    phi = cosine(dot, grad_sq, scope_sq)  # eq. 4

    # a, b and α of g' = a·g_D + b·ĝ_G.
    gamma_t = gamma(tables.counters[0], settings) if gamma_override is None else gamma_override.double()  # eq. 2
    a, b, alpha = 1.0 - gamma_t.expand_as(phi), gamma_t.expand_as(phi), torch.ones_like(phi)
    if settings.correction in ("agem", "pcgrad"):
        a, b = projection_weights(settings.correction, dot, grad_sq, scope_sq)
    elif alpha_override is not None:
        alpha = alpha_override[active].double()
    elif settings.correction == "cosine":
        alpha = correction(phi, settings.bounds)  # eq. 5
    one = torch.ones_like(phi)
    a, alpha = torch.where(has_global, a, one), torch.where(has_global, alpha, one)
    b, phi = torch.where(has_global, b, 0.0), torch.where(has_global, phi, 0.0)

    # A skipped step counts nowhere.
    advance = (~skip).to(torch.float64)
    tables.counters.add_(torch.stack((~skip, skip)))
    tables.steps[active] += advance.to(tables.steps.dtype)
    betas = h[:, [Hyper.BETA1, Hyper.BETA2]]
    bias = tables.bias_corrections[active]
    tables.bias_corrections[active] = torch.where(skip, bias, betas * bias + (1.0 - betas))

    row = torch.empty(len(active), Coefficient.COUNT, dtype=torch.float64, device=table.device)
    bias = tables.bias_corrections[active]
    row[:, Coefficient.GRAD_WEIGHT] = a * factor * inverse_scale
    row[:, Coefficient.GLOBAL_WEIGHT] = b
    row[:, Coefficient.BETA1] = h[:, Hyper.BETA1]
    row[:, Coefficient.ONE_MINUS_BETA1] = 1.0 - h[:, Hyper.BETA1]
    row[:, Coefficient.BETA2] = h[:, Hyper.BETA2]
    row[:, Coefficient.ONE_MINUS_BETA2] = 1.0 - h[:, Hyper.BETA2]
    row[:, Coefficient.STEP_SIZE] = h[:, Hyper.LR] * alpha / bias[:, 0]
    row[:, Coefficient.INV_SQRT_BIAS_CORRECTION2] = bias[:, 1].rsqrt()
    row[:, Coefficient.EPS] = h[:, Hyper.EPS]
    row[:, Coefficient.LR_WEIGHT_DECAY] = h[:, Hyper.LR] * h[:, Hyper.WEIGHT_DECAY]
    row[:, Coefficient.STEP] = tables.steps[active].double()
    row[:, Coefficient.SKIP] = skip.double()
    table[active] = row
    tables.report[active] = torch.stack((phi, alpha), dim=1)
    tables.summary[Summary.GAMMA] = gamma_t
    tables.summary[Summary.CLIP_FACTOR] = factor
    tables.summary[Summary.GRAD_NORM] = grad_norm
    tables.summary[Summary.GLOBAL_NORM] = stored_sq.sum().sqrt()

"""Stage 1, the global gradient: an fp32 sum over the general data, divided once by its weight (eq. 1)."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import SQUARED_NORM_LIMIT


def accumulate_one(total: torch.Tensor, grad: torch.Tensor, weight: float) -> torch.Tensor:
    """Add ``weight · grad`` to ``total`` in place; return ‖grad‖² (float64 scalar).

    A non-finite gradient adds nothing, whole tensor, nor does one with a norm of 1e18 or more; the returned norm is
    then infinite, which is how the caller counts it.

    Args:
        total: fp32 or fp64 running sum, shape of ``grad``.
        grad: floating-point gradient of one micro-batch.
        weight: weight of the micro-batch (1, or its number of target tokens).
    """
    wide = grad.to(total.dtype)
    squared_norm = wide.double().square().sum()
    squared_norm = torch.where(squared_norm <= SQUARED_NORM_LIMIT, squared_norm, torch.inf)  # NaN too
    total.add_(torch.where(torch.isfinite(squared_norm), wide, torch.zeros_like(wide)), alpha=weight)
    return squared_norm


def mean_gradient(total: torch.Tensor, total_weight: float) -> torch.Tensor:
    """ĝ_G = (1/s) Σ_i g_G,i  (eq. 1), with s the sum of the weights.

    The limit β₁→1 of Adam's bias-corrected first moment, without β₁: an uncorrected EMA tends to 0, and a running mean
    in low precision stagnates as its increments shrink.
    """
    return total / total_weight


def accumulate(
    totals: list[torch.Tensor],
    grads: list[torch.Tensor],
    weight: float,
    squared_norms: torch.Tensor,
    cache: dict[str, Any] | None = None,
) -> None:
    """:func:`accumulate_one` for every tensor; writes ‖grad‖² of each to ``squared_norms`` (float64 ``[n]``)."""
    for i, (total, grad) in enumerate(zip(totals, grads, strict=True)):
        squared_norms[i] = accumulate_one(total, grad, weight)

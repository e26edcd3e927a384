"""The second order of the general loss as an anchor (METHOD's eqs. 10–13). Ours: the paper has none of this.

Near the base model θ₀, with δ = θ − θ₀, L_G(θ) ≈ L_G(θ₀) + ⟨ĝ_G, δ⟩ + ½ ⟨δ, H δ⟩. H is the Kronecker-factored
approximation of the Hessian of the mean loss per token (K-FAC: Martens & Grosse 2015; as an anchor against
forgetting: Ritter et al. 2018).
"""

from __future__ import annotations

import torch

from ..factors import Curvature, DiagonalFactor, Factor, KroneckerTerm, LowRankFactor
from .quantize import decode


def kronecker_factors(
    inputs: torch.Tensor, output_grads: torch.Tensor, targets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = E[x xᵀ] and B = (1/N) Σ d dᵀ of one linear map y = W x  (eq. 11), dense.

    A position counts where its output gradient is not zero: padding does not, nor does a token that no target depends
    on. Were positions as independent as K-FAC takes them to be, B Δ A would be the Fisher matrix of the mean loss per
    token, applied to Δ.

    Args:
        inputs: x, ``[positions, in]``.
        output_grads: d, ``[positions, out]``, gradients of the *sum* of the loss over the targets: N times those of
            the mean loss.
        targets: N.
    """
    counts = (output_grads != 0).any(dim=1)
    x, d = inputs[counts], output_grads[counts]
    return x.T @ x / len(x), d.T @ d / targets


def dense_factor(factor: Factor) -> torch.Tensor:
    """U diag(σ) Uᵀ + a I  (eq. 12), or the diagonal, as a matrix; fp64."""
    if isinstance(factor, DiagonalFactor):
        return factor.diagonal.double().diag()
    u = decode(factor.u).double()
    return (u * factor.sigma.double()) @ u.T + factor.rest * torch.eye(len(u), dtype=u.dtype, device=u.device)


def _times(matrix: torch.Tensor, right: LowRankFactor) -> torch.Tensor:
    """``matrix · right``."""
    u = decode(right.u).to(matrix.dtype)
    return ((matrix @ u) * right.sigma.to(matrix.dtype)) @ u.T + right.rest * matrix


def _of(left: Factor, matrix: torch.Tensor) -> torch.Tensor:
    """``left · matrix``."""
    if isinstance(left, DiagonalFactor):
        return left.diagonal.to(matrix.dtype).unsqueeze(1) * matrix
    return _times(matrix.T, left).T


def kronecker_product(term: KroneckerTerm, delta: torch.Tensor) -> torch.Tensor:
    """B Δ A  (eq. 11) of ``delta.flatten(1)``, in the shape of ``delta``."""
    return _of(term.left, _times(delta.flatten(1), term.right)).reshape(delta.shape)


def hessian_product(curvature: Curvature, delta: torch.Tensor) -> torch.Tensor:
    """H Δ of one parameter: its maps add up; without any, H is diagonal."""
    if curvature.diagonal is not None:
        return curvature.diagonal.to(delta.dtype) * delta
    return torch.stack([kronecker_product(term, delta) for term in curvature.terms]).sum(dim=0)


def anchored_gradient(grad: torch.Tensor, curvature: Curvature, delta: torch.Tensor, anchor: float) -> torch.Tensor:
    """g + λ · H (θ − θ₀)  (eq. 10), before Adam's moments.

    Args:
        grad: a · g_D, the clipped and weighted domain gradient.
        curvature: H of the parameter.
        delta: θ − θ₀, of the exact parameter, remainder included.
        anchor: λ.
    """
    return grad + anchor * hessian_product(curvature, delta)


def predicted_rise(curvature: Curvature, delta: torch.Tensor) -> torch.Tensor:
    """½ ⟨δ, H δ⟩: the rise of the general loss that the second order predicts, in nats per token (float64)."""
    wide = delta.double()
    return 0.5 * (wide * hessian_product(curvature, wide)).sum()


def shrinkage(signal: float | None, noise: float | None) -> float:
    """s = max(0, 1 − 1/SNR) of a noisy mean  (eq. 13), SNR = ‖μ‖² / E‖ĝ_G − μ‖² as the file records both parts.

    More careful than the factor that minimises E‖s ĝ_G − μ‖², SNR / (1 + SNR): the noise of a stored mean is the same
    at every step, and does not average out. 1 where signal and noise are unknown.
    """
    if signal is None or noise is None:
        return 1.0
    return max(0.0, 1.0 - noise / signal) if signal > 0 and noise > 0 else float(noise <= 0)

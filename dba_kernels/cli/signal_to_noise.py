"""What the signal-to-noise estimate of a global gradient says about collecting more.

With s = ‖μ‖² / E‖ĝ_G − μ‖², where μ is the gradient over infinitely much such data: the noise of a mean falls as one
over the number of batches n, so s grows linearly, s(n) = n · s₁; and the expected cosine of ĝ_G and μ is, to first
order, √(s / (1 + s)).
"""

from __future__ import annotations

import math

from dba_kernels import GlobalGradient

ENOUGH = 0.95
"""Cosine with μ beyond which doubling the batches turns ĝ_G by little: from 0.95 to 0.97."""


def expected_cosine(signal_to_noise: float) -> float:
    """√(s / (1 + s)); 0 where the estimate is not positive."""
    s = max(signal_to_noise, 0.0)
    return math.sqrt(s / (1 + s))


def batches_for(cosine: float, signal_to_noise: float, batches: int) -> int:
    """n' = n · s' / s with s' = c² / (1 − c²): micro-batches for the cosine c, from s measured with n of them."""
    return math.ceil(batches * cosine**2 / (1 - cosine**2) / signal_to_noise)


def advice(gradient: GlobalGradient, goal: float = ENOUGH) -> str:
    """In words: how good ĝ_G is, and whether more batches are worth it."""
    s, n = gradient.signal_to_noise, gradient.provenance.batches
    if s is None:
        return "signal-to-noise: unknown (it takes at least two batches that were collected, not made otherwise)"
    measured = f"signal-to-noise {s:.3g} after {n:,} batches"
    if s <= 0:
        return f"{measured}: the noise hides the signal. Collect {4 * n:,} batches, and look again."
    cosine, twice = expected_cosine(s), expected_cosine(2 * s)
    head = f"{measured}: cosine with the gradient of endlessly much such data ≈ {cosine:.2f}."
    if cosine >= goal:
        return f"{head} That is enough: twice as many would give {twice:.2f}."
    wanted = batches_for(goal, s, n)
    return f"{head} More batches are worth it: {2 * n:,} would give {twice:.2f}, about {wanted:,} give {goal:.2f}."

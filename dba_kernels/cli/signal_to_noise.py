"""What the signal-to-noise estimate of a global gradient says about collecting more.

With s = ‖μ‖² / E‖ĝ_G − μ‖², where μ is the gradient over infinitely much such data: the noise of a mean falls as one
over the number of batches n, so s grows linearly, s(n) = n · s₁; and the expected cosine of ĝ_G and μ is, to first
order, √(s / (1 + s)). Collections of different lengths compare by s₁, the figure per batch.
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


def per_batch(signal_to_noise: float | None, batches: int) -> float | None:
    """s₁ = s / n; None where s is not known."""
    return None if signal_to_noise is None or not batches else signal_to_noise / batches


def measured(signal_to_noise: float, batches: int, tokens: int) -> str:
    """The estimate in words: the total, the number of batches that it speaks of, and the figure per batch."""
    return (
        f"signal-to-noise {signal_to_noise:.3g} after {batches:,} batches, {signal_to_noise / batches:.3g} per batch "
        f"of about {tokens / batches:,.0f} target tokens"
    )


def advice(gradient: GlobalGradient, goal: float = ENOUGH) -> str:
    """In words: how good ĝ_G is, and whether more batches, of the same size, are worth it."""
    p = gradient.provenance
    s, n = gradient.signal_to_noise, p.batches
    if s is None:
        return "signal-to-noise: unknown (it takes at least two batches that were collected, not made otherwise)"
    found = measured(s, n, p.tokens)
    if s <= 0:
        return f"{found}: the noise hides the signal. Collect {4 * n:,} batches in all, and look again."
    cosine, twice = expected_cosine(s), expected_cosine(2 * s)
    head = f"{found}: cosine with the gradient of endlessly much such data ≈ {cosine:.2f}."
    if cosine >= goal:
        return f"{head} That is enough: {2 * n:,} batches in all would give {twice:.2f}."
    wanted = batches_for(goal, s, n)
    return (
        f"{head} More batches are worth it: {2 * n:,} in all (--batches {2 * n}) would give {twice:.2f}, about "
        f"{wanted:,} in all give {goal:.2f}."
    )

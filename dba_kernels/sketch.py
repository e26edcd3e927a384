"""A symmetric positive matrix seen through one random projection: the curvature's factors in one pass over the data.

    Y = M Ω,   Ω [n, l] of random signs,   M ≈ Y (Ωᵀ Y)⁺ Yᵀ      (Nyström; Tropp, Yurtsever, Udell & Cevher 2017)

Y is linear in M: sums over batches, ranks and sessions are sketches of the sums. M itself, ``[n, n]``, is never made,
unless n ≤ l.
With l = r + p columns and Gaussian Ω the best rank-r part of the approximation is off, in the trace norm and in
expectation, by at most (1 + r / (p − 1)) Σ_{j>r} λ_j (their theorem 4.1); random signs behave alike and are the same
bits on every machine.
"""

from __future__ import annotations

import functools

import torch

OVERSAMPLING = 16
"""p: columns of a sketch beyond the rank that is kept of it."""

_GOLDEN = 0x9E3779B9  # 2³² / golden ratio


def _mix(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, kept in int64, whose every output bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = ((words ^ (words >> shift)) * factor) & 0xFFFFFFFF
    return words ^ (words >> 16)


@functools.lru_cache(maxsize=8)
def _signs(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    row = torch.arange(rows, device=device).unsqueeze(1)
    column = torch.arange(columns, device=device)
    bits = _mix(_mix(row + 1) ^ (column * _GOLDEN & 0xFFFFFFFF))
    return (1 - 2 * (bits & 1)).to(dtype)


def signs(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ω: ±1 at (i, j) as a hash of i and j says, whatever the size; ``[rows, columns]``, not to be written to.

    One matrix serves every sketch: it has to be independent of what is sketched, not of other sketches.
    """
    length = 1 << max(10, (rows - 1).bit_length())  # few sizes, so that what is kept serves all layers
    return _signs(length, columns, device, dtype)[:rows]


def project(vectors: torch.Tensor, columns: int) -> torch.Tensor:
    """``vectors · Ω``, ``[k, n] → [k, columns]``; with as many columns as rows Ω is the identity: M itself is small."""
    size = vectors.shape[1]
    return vectors if columns == size else vectors @ signs(size, columns, vectors.device, vectors.dtype)


def eigenpairs(sketch: torch.Tensor, rank: int, trace: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors ``[n, r]`` and eigenvalues ``[r]`` (descending, at least 0; fp64) of the matrix behind a sketch.

    What rounding hides is left out: directions in which Ωᵀ M Ω is below its largest eigenvalue times l machine epsilons
    of the sketch's dtype.

    Args:
        sketch: Y, ``[n, l]``.
        rank: r ≤ l; less than r directions where the matrix has no more: the rest is zeros.
        trace: of the matrix; eigenvalues are scaled down should they add up to more.
    """
    n, columns = sketch.shape
    y = sketch.double()
    core = project(y.T, columns)
    weights, basis = torch.linalg.eigh((core + core.T) / 2)
    keep = weights > weights[-1].clamp(min=0.0) * columns * torch.finfo(sketch.dtype).eps
    left, root, _ = torch.linalg.svd(y @ (basis[:, keep] * weights[keep].rsqrt()), full_matrices=False)
    found = min(rank, len(root))
    u, values = y.new_zeros(n, rank), y.new_zeros(rank)
    u[:, :found], values[:found] = left[:, :found], root[:found].square()
    total = float(values.sum())
    return u, values * (trace / total) if total > trace else values


def with_rest(values: torch.Tensor, size: int, trace: float) -> tuple[torch.Tensor, float]:
    """σ and a of eq. 12: the directions outside of U share evenly what the trace has beyond the eigenvalues."""
    outside = size - len(values)
    rest = max(0.0, trace - float(values.sum())) / outside if outside > 0 else 0.0
    return values - rest, rest

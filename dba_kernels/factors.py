"""What is stored of the general loss's second order: one Kronecker product, or two, or a diagonal, per parameter.

Plain data, as in :mod:`.formats`; the definitions are in :mod:`.reference.anchor`. A matrix is read as
``tensor.flatten(1)``, ``[rows, cols]``; the left factor is ``[rows, rows]``, the right one ``[cols, cols]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .formats import EncodedTensor


@dataclass(frozen=True)
class LowRankFactor:
    """The symmetric matrix ``U diag(sigma) Uᵀ + rest · I``  (eq. 12).

    Args:
        u: ``[n, r]``, columns orthonormal before they were encoded.
        sigma: fp32 ``[r]``, eigenvalue minus ``rest``.
        rest: eigenvalue of every direction outside of U: with it the trace is kept.
    """

    u: EncodedTensor
    sigma: torch.Tensor
    rest: float

    @property
    def size(self) -> int:
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        return self.sigma.numel()

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.sigma.nbytes

    def to(self, device: torch.device | str) -> LowRankFactor:
        return replace(self, u=self.u.to(device), sigma=self.sigma.to(device))

    def rows(self, start: int, stop: int) -> LowRankFactor:
        """The rows of U that belong to a row shard of the parameter."""
        return replace(self, u=self.u.row_slice(start, stop))


@dataclass(frozen=True)
class DiagonalFactor:
    """A diagonal matrix; fp32 ``[n]``. An embedding's inputs: how often each token occurs."""

    diagonal: torch.Tensor

    @property
    def size(self) -> int:
        return self.diagonal.numel()

    @property
    def nbytes(self) -> int:
        return self.diagonal.nbytes

    def to(self, device: torch.device | str) -> DiagonalFactor:
        return DiagonalFactor(self.diagonal.to(device))

    def rows(self, start: int, stop: int) -> DiagonalFactor:
        return DiagonalFactor(self.diagonal[start:stop])


Factor = LowRankFactor | DiagonalFactor


@dataclass(frozen=True)
class KroneckerTerm:
    """Δ ↦ left · Δ · right  (eq. 11): left is B and right is A for a weight ``[out, in]``, the other way round for
    one that is ``[in, out]``."""

    left: Factor
    right: LowRankFactor

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def to(self, device: torch.device | str) -> KroneckerTerm:
        return KroneckerTerm(self.left.to(device), self.right.to(device))

    def rows(self, start: int, stop: int) -> KroneckerTerm:
        return KroneckerTerm(self.left.rows(start, stop), self.right)


@dataclass(frozen=True)
class Curvature:
    """H of one parameter: the sum of ``terms``, or where it belongs to no linear map a diagonal.

    Args:
        terms: one per use of the parameter in a linear map: a tied embedding has two.
        diagonal: fp32 of the parameter's shape, or of shape ``()`` for a multiple of the identity; None with terms.
    """

    terms: tuple[KroneckerTerm, ...] = ()
    diagonal: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        own = 0 if self.diagonal is None else self.diagonal.nbytes
        return own + sum(term.nbytes for term in self.terms)

    def to(self, device: torch.device | str) -> Curvature:
        diagonal = None if self.diagonal is None else self.diagonal.to(device)
        return Curvature(tuple(term.to(device) for term in self.terms), diagonal)

    def rows(self, start: int, stop: int) -> Curvature:
        """H of rows ``start:stop`` of dimension 0; views."""
        diagonal = self.diagonal
        if diagonal is not None and diagonal.dim() > 0:
            diagonal = diagonal[start:stop]
        return Curvature(tuple(term.rows(start, stop) for term in self.terms), diagonal)

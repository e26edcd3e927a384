"""Bytes that a fine-tuning run holds between steps, from the shapes of the parameters alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dba_kernels.formats import (
    PARAM_FORMATS,
    STATE_FORMATS,
    STORAGE_FORMATS,
    is_compressible,
    matrix_shape,
    scales_shape,
    storage_format,
)

Shapes = Mapping[str, tuple[int, ...]]


def dense_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Codes and scales of one tensor of the global gradient."""
    chosen = storage_format(format, shape)
    scales = 4 * math.prod(scales_shape(shape)) if chosen.grouped else 0
    return chosen.dtype.itemsize * math.prod(chosen.codes_shape(shape)) + scales


def low_rank_bytes(format: str, shape: tuple[int, ...], rank: int) -> int:
    """U, σ and V where that is smaller than the matrix: r < m·n / (m + n)."""
    rows, cols = matrix_shape(shape)
    if not is_compressible(shape) or rank * (rows + cols) >= rows * cols:
        return dense_bytes(format, shape)
    return dense_bytes(format, (rows, rank)) + dense_bytes(format, (cols, rank)) + 4 * rank


def state_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Both moments, their scales, and the step count (fp32)."""
    parts = STATE_FORMATS[format if is_compressible(shape) else "fp32"].parts(shape)
    return sum(math.prod(size) * dtype.itemsize for size, dtype in parts.values()) + 4


def curvature_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Both factors of a matrix, of this rank and in int8; a vector's diagonal; a number for stacked matrices."""
    if len(shape) != 2:
        return 4 * math.prod(shape) if len(shape) == 1 else 4
    factors = [(size, min(rank, size)) for size in shape]
    return sum(dense_bytes("int8", factor) + 4 * factor[1] for factor in factors)


@dataclass(frozen=True)
class Sizes:
    """Bytes of every part of a fine-tuning run, over all parameters.

    Args:
        shapes: of the parameters.
        dtype: of weights and gradients.
        rank: of one more choice of global gradient; None for none.
        curvature: rank of an anchor's factors; None for none.
    """

    shapes: Shapes
    dtype: torch.dtype
    rank: int | None = None
    curvature: int | None = None

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def param_formats(self) -> tuple[str, ...]:
        return tuple(PARAM_FORMATS) if self.dtype == torch.bfloat16 else ("native",)

    @property
    def weights(self) -> int:
        return self.parameters * self.dtype.itemsize

    def remainder(self, param_format: str) -> int:
        return self.parameters * PARAM_FORMATS[param_format].bytes_per_parameter

    def state(self, format: str) -> int:
        return self._sum(lambda shape: state_bytes(format, shape))

    @property
    def globals(self) -> dict[str, int]:
        """Every format of the global gradient; "none" for plain AdamW."""
        found = {"none": 0}
        for name in STORAGE_FORMATS:
            found[name] = self._sum(lambda shape, name=name: dense_bytes(name, shape))  # type: ignore[misc]
        if (rank := self.rank) is not None:
            found[f"rank {rank}, int8"] = self._sum(lambda shape: low_rank_bytes("int8", shape, rank))
        return found

    @property
    def anchor(self) -> int:
        """θ₀, and the curvature's factors in int8; every matrix taken for a linear map's."""
        if (rank := self.curvature) is None:
            return 0
        return self.weights + self._sum(lambda shape: curvature_bytes(shape, rank))

    def _sum(self, bytes_of: Callable[[tuple[int, ...]], int]) -> int:
        return sum(map(bytes_of, self.shapes.values()))

    def total(self, param_format: str, state_format: str, global_bytes: int) -> int:
        """Everything between steps: weights, remainder, gradients, state, global gradient, anchor."""
        state = self.remainder(param_format) + self.state(state_format)
        return 2 * self.weights + state + global_bytes + self.anchor

    def as_dict(self) -> dict[str, Any]:
        totals = [
            {"param_format": p, "state_format": s, "global_gradient": g, "bytes": total}
            | {"bytes_per_parameter": total / self.parameters}
            for p in self.param_formats
            for s in STATE_FORMATS
            for g, size in self.globals.items()
            for total in (self.total(p, s, size),)
        ]
        counted = {"parameters": self.parameters, "tensors": len(self.shapes), "anchor": self.anchor}
        return counted | {"totals": totals}

"""A GPU's approximate roots and division in Triton's interpreter: errors drawn within the bounds that PTX states.

The interpreter computes roots and quotients correctly rounded, a GPU does not: what agrees here might not there. As on
a GPU, the error is a function of the result, so that the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .exact import DIVISION, RSQRT, SMALLEST, SQRT


def draw(factor: float = 1.0) -> None:
    """From now on fp32 roots and quotients of this process are off by up to ``factor`` times their bounds."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def off(data: Any, bound: float) -> Any:
        if data.dtype != np.float32:
            return data
        hashed = data.view(np.uint32).astype(np.uint64) * 0x9E3779B97F4A7C15
        share = (hashed >> 40).astype(np.float64) / 2**23 - 1  # in [-1, 1)
        share = np.sign(share) * np.abs(share) ** 0.25  # mostly near the ends
        return (data.astype(np.float64) * (1 + factor * bound * share)).astype(np.float32)

    def flushed(data: Any) -> Any:
        return np.where(np.abs(data) < np.float32(SMALLEST), np.float32(0), data) if data.dtype == np.float32 else data

    def root(self: Any, arg: Any) -> Any:
        return TensorHandle(off(np.sqrt(flushed(arg.data)), SQRT), arg.dtype.scalar)

    def inverse_root(self: Any, arg: Any) -> Any:
        exact = 1 / np.sqrt(flushed(arg.data).astype(np.float64))
        return TensorHandle(off(exact.astype(arg.data.dtype), RSQRT), arg.dtype.scalar)

    def quotient(self: Any, lhs: Any, rhs: Any) -> Any:
        return TensorHandle(off(np.divide(lhs.data, rhs.data), DIVISION), lhs.dtype.scalar)

    InterpreterBuilder.create_sqrt = root
    InterpreterBuilder.create_rsqrt = inverse_root
    InterpreterBuilder.create_fdiv = quotient

"""The codecs a second time: float64 numpy, bit by bit, sharing nothing with the reference.

A code is right when no other code is nearer to the element; elements within :data:`FUZZ` of a boundary between two
codes may take either, because fp32 arithmetic decides there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

GROUP = 64
FUZZ = 1e-4
SMALLEST_SCALE = 2.0**-126


def fp8_value(code: int) -> float:
    """e4m3fn from its bits: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity, S.1111.111 is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and fraction == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def int4_values(packed: np.ndarray, cols: int) -> np.ndarray:
    """Codes of each row: low nibble first, two's complement."""
    codes = np.zeros((packed.shape[0], cols), dtype=np.int64)
    for j in range(cols):
        nibble = (packed[:, j // 2].astype(np.int64) >> (4 * (j % 2))) & 0xF
        codes[:, j] = nibble - 16 * (nibble >= 8)
    return codes


Bound = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The stated bound on an element's error, from its magnitude and the absmax of its group."""


def quadratic_bound(code_max: int) -> Bound:
    return lambda magnitude, absmax: np.sqrt(magnitude) * np.sqrt(absmax) / code_max + absmax / (2 * code_max) ** 2


def float_bound(precision: int, smallest: float, largest: float) -> Bound:
    """Half an ulp of ``precision`` significant bits; half the smallest subnormal where that is more."""
    return lambda magnitude, absmax: np.maximum(magnitude * 2.0**-precision, absmax * smallest / 2 / largest)


@dataclass(frozen=True)
class Codec:
    """One grouped codec: the value of each code where the scale is 1, and where an element falls between the codes.

    Args:
        largest: value of the largest code.
        produced: the codes that encoding can produce.
        bound: None where the test has one of its own.
        floats: the values of all 256 codes, where they are the bits of an 8-bit float.
        packed: whether two codes share a byte.
    """

    name: str
    largest: float
    produced: Sequence[int]
    bound: Bound | None = None
    floats: tuple[float, ...] = ()
    packed: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return self.floats.index(self.largest) if self.floats else max(self.produced)

    def values(self, codes: np.ndarray, cols: int) -> np.ndarray:
        """What the codes mean, in units of the scale."""
        if self.floats:
            return np.array(self.floats)[codes]
        wide = (int4_values(codes, cols) if self.packed else codes).astype(float)
        return wide**4 if self.name == "exp_avg_sq" else np.sign(wide) * wide**2

    def ideal(self, units: np.ndarray) -> np.ndarray:
        """The real number that the code of an element of value ``units`` (in scales) must be nearest to."""
        return units**0.25 if self.name == "exp_avg_sq" else np.sign(units) * np.sqrt(np.abs(units))


E4M3 = tuple(map(fp8_value, range(256)))


def finite_codes(floats: Sequence[float]) -> list[int]:
    return [code for code, value in enumerate(floats) if math.isfinite(value)]


CODECS = {
    codec.name: codec
    for codec in (
        Codec("int8", 127.0**2, range(-127, 128), quadratic_bound(127)),
        Codec("int4", 7.0**2, range(-7, 8), quadratic_bound(7), packed=True),
        Codec("fp8_e4m3", 448.0, finite_codes(E4M3), float_bound(4, 2.0**-9, 448.0), E4M3),
        Codec("exp_avg", 127.0**2, range(-127, 128), quadratic_bound(127)),
        Codec("exp_avg_sq", 255.0**4, range(256)),
    )
}


def per_element(scales: np.ndarray, cols: int) -> np.ndarray:
    """Each element's scale, float64 ``[rows, cols]``."""
    return np.repeat(scales.astype(float), GROUP, axis=1)[:, :cols]


def group_absmax(matrix: np.ndarray) -> np.ndarray:
    rows, cols = matrix.shape
    absmax = np.zeros((rows, -(-cols // GROUP)))
    for j in range(absmax.shape[1]):
        absmax[:, j] = np.abs(matrix[:, j * GROUP : (j + 1) * GROUP]).max(axis=1, initial=0.0)
    return absmax


def check_encoding(codec: Codec, matrix: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
    """Assert that ``codes`` and ``scales`` are the right encoding of ``matrix`` (float64 values of fp32 elements)."""
    rows, cols = matrix.shape
    exact = group_absmax(matrix) / codec.largest
    assert scales.shape == exact.shape and scales.dtype == np.float32
    usable = exact >= SMALLEST_SCALE * (1 + 1e-6)
    np.testing.assert_allclose(scales[usable], exact[usable], rtol=2.0**-22)
    assert (scales[exact < SMALLEST_SCALE * (1 - 1e-6)] == 0).all(), "a subnormal scale must be stored as 0"

    scale = per_element(scales, cols)
    values = codec.values(codes, cols)
    assert values.shape == (rows, cols)
    assert np.isfinite(values).all(), "a code that means no number"
    assert (values[scale == 0] == 0).all(), "a group without scale must hold zeros"
    live = scale > 0
    units, values = matrix[live] / scale[live], values[live]
    if codec.floats:
        table = np.array(codec.floats)
        table = np.unique(table[np.isfinite(table)])
        above = np.searchsorted(table, units).clip(1, len(table) - 1)
        nearest = np.minimum(np.abs(units - table[above - 1]), np.abs(units - table[above]))
        assert (np.abs(units - values) <= nearest * (1 + FUZZ) + FUZZ * np.abs(units) / 16).all()
        return
    ideal = codec.ideal(units)
    got = codec.ideal(values)  # the codes themselves
    if codec.name == "exp_avg_sq":
        assert (got[units > 0] >= 1).all(), "v > 0 must not decode to 0"
        assert (got[units == 0] == 0).all()
        ideal = np.where(units > 0, np.maximum(ideal, 1.0), 0.0)
    assert (np.abs(got - ideal) <= 0.5 + FUZZ).all(), "not the nearest code"


def round_to_bf16(matrix: np.ndarray) -> np.ndarray:
    """Nearest bf16, ties to even, on the bits of fp32."""
    bits = matrix.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(float)

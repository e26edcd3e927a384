"""Parameter formats: a low-precision weight plus a remainder held in the optimizer state.

In the annealing regime (η ≈ 1e-6 → 0) an update is far below one bf16 ulp of the weight; the remainder keeps it.

bf16: with ``bits`` the fp32 pattern, ``weight = (bits + 0x8000) >> 16`` (nearest, ties away from zero: a tie must go up
for its remainder to fit) and ``remainder = bits - (weight << 16)``. split16 keeps all 16 bits: weight and remainder
*are* the fp32 value. split8 keeps the upper 8, after rounding the pattern stochastically to a multiple of 256.

fp16: the weight is the nearest fp16, the remainder is the difference in units of ulp(weight)·2⁻¹⁵ (split16) or
ulp(weight)·2⁻⁷ (split8). split16 is exact for 2⁻¹⁶ ≤ |θ| ≤ 65504 and within 2⁻⁴⁰ below.

Writes from outside. Whatever somebody writes into a weight between two steps is its new value.

- ``master`` notices: a copy whose rounding is not the weight is dropped, and the weight alone counts.
- ``split16`` and ``split8`` have no bit to spare for noticing. The remainder stays and completes the new weight, by
  half an ulp of it at most. A weight that nobody wrote keeps its own, so masking after every step costs nothing.
  A remainder that no value could have left beside the weight is dropped: bf16, a negative one at ±0 and a positive one
  at ±inf, whose joined patterns would be NaN; fp16, one that reaches further toward zero from a power of two than half
  the distance to its lower neighbour.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_FP16_FRACTION_BITS = {"split16": 15, "split8": 7}
_NAN_BITS = 0x7FC00000
"""Any NaN is stored as this one: others overflow when they are rounded (that of NVIDIA GPUs, 0x7FFFFFFF, to −0)."""


def mix32(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash with full avalanche, on int64 tensors that hold unsigned 32-bit values.

    The multiply-xorshift permutation "lowbias32" of C. Wellons' hash prospector.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def random_words(shape: tuple[int, ...], seed: int, step: int, offset: int, device: torch.device) -> torch.Tensor:
    """Counter-based random 32-bit words, as int64: a function of (seed, step, element index) and nothing else.

    Element ``i`` of the flattened whole parameter draws ``mix32(low32(i) ^ key)``, where
    ``key = mix32(seed + step · 0x9E3779B9 + high32(i) · 0x85EBCA6B)`` (all modulo 2³²). So a row shard that knows its
    ``offset`` rounds as the whole tensor would. The top byte rounds split8 remainders, the low half bf16 exp_avg_sq.
    """
    numel = int(torch.Size(shape).numel())
    index = torch.arange(offset, offset + numel, dtype=torch.int64, device=device)
    key = mix32((seed + step * 0x9E3779B9 + (index >> 32) * 0x85EBCA6B) & _MASK32)
    return mix32((index & _MASK32) ^ key).reshape(shape)


def stochastic_bf16(value: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """fp32 → bf16, rounded up in magnitude with the probability of what is cut off; ``words & 0xFFFF`` decides."""
    bits = torch.where(value.isnan(), _NAN_BITS, value.view(torch.int32) + (words & 0xFFFF).to(torch.int32))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _fp16_unit_exponent(weight: torch.Tensor, format: str) -> torch.Tensor:
    """Power of two of the remainder's unit: ulp(weight) = 2^(e - 10), e the weight's exponent, at least -14."""
    exponent = ((weight.view(torch.int16).to(torch.int32) >> 10) & 31).clamp(min=1) - 15  # field 0: zero, subnormal
    return exponent - 10 - _FP16_FRACTION_BITS[format]


def join(weight: torch.Tensor, remainder: torch.Tensor, format: str) -> torch.Tensor:
    """The fp32 parameter that ``weight`` and ``remainder`` stand for; a remainder that is not the weight's is dropped.

    Args:
        weight: bf16 or fp16.
        remainder: int16 (split16), int8 (split8) or fp32 (master), shape of ``weight``.
    """
    if format == "master":
        return torch.where(remainder.to(weight.dtype) == weight, remainder, weight.to(torch.float32))
    pattern, low = weight.view(torch.int16).to(torch.int32), remainder.to(torch.int32)
    if weight.dtype == torch.float16:
        # Powers of two whose lower neighbour is half an ulp away.
        below = (pattern & 0x3FF == 0) & (pattern & 0x7FFF >= 0x800)
        quarter = 1 << (_FP16_FRACTION_BITS[format] - 2)
        low = torch.where(below & (torch.where(pattern < 0, -low, low) < -quarter), 0, low)
        unit = torch.ldexp(torch.ones_like(weight, dtype=torch.float32), _fp16_unit_exponent(weight, format))
        return weight.to(torch.float32) + low.to(torch.float32) * unit
    if format == "split8":
        low = low << 8
    value = ((pattern << 16) + low).view(torch.float32)
    return torch.where(value.isnan(), weight.to(torch.float32), value)


def displacement(
    param: torch.Tensor, remainder: torch.Tensor | None, origin: torch.Tensor, param_format: str
) -> torch.Tensor:
    """θ − θ₀ of the exact parameter, in fp32 (fp64 of fp64), in the shape of ``param``."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    exact = param.to(dtype) if remainder is None else join(param, remainder, param_format)
    return exact - origin.to(dtype)


def split(
    value: torch.Tensor, dtype: torch.dtype, format: str, random: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 ``value`` into a weight of ``dtype`` and its remainder; the inverse of :func:`join`.

    Args:
        value: fp32.
        dtype: bf16 or fp16.
        format: ``"split16"``, ``"split8"`` or ``"master"``.
        random: int64 in [0, 255], shape of ``value``, for split8's stochastic rounding; None rounds toward zero in
            magnitude (bf16) or down (fp16), which is exact where ``value`` is already on split8's grid.
    """
    if format == "master":
        return value.to(dtype), value
    random = torch.zeros_like(value, dtype=torch.int64) if random is None else random
    if dtype == torch.float16:
        weight = value.to(torch.float16)
        exponent = _fp16_unit_exponent(weight, format)
        units = (value - weight.to(torch.float32)) * torch.ldexp(torch.ones_like(value), -exponent)
        if format == "split16":
            return weight, units.round().to(torch.int16)
        return weight, (units + random.to(torch.float32) / 256).floor().to(torch.int8)
    bits = torch.where(value.isnan(), _NAN_BITS, value.view(torch.int32))
    if format == "split8":
        bits = (bits + random.to(torch.int32)) & ~0xFF
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    weight = high.to(torch.int16).view(torch.bfloat16)
    return weight, (low >> 8).to(torch.int8) if format == "split8" else low.to(torch.int16)

"""Parameter formats in registers: a low-precision weight and the remainder that completes it.

bf16: the fp32 pattern is cut in two, the weight rounded to nearest (ties away from zero). fp16: the remainder counts
units of ulp(weight)·2⁻¹⁵ (split16) or ·2⁻⁷ (split8). A remainder that cannot be the weight's own is dropped: somebody
has written the weight since.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import narrow_integer
from .common import narrow

NAN_BITS = tl.constexpr(0x7FC00000)  # any NaN is stored so: the GPU's own, 0x7FFFFFFF, would be rounded to -0


@triton.jit
def mix32(x):
    """The 32-bit hash "lowbias32" of C. Wellons' hash prospector, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step, high):
    """Key of the elements whose index has these upper 32 bits; all uint32."""
    return mix32(seed + step * 0x9E3779B9 + high * 0x85EBCA6B)


@triton.jit
def random_words(seed, step, first, offsets, MASKED: tl.constexpr):
    """Counter-based random uint32 of the elements ``first + offsets`` of the whole parameter.

    A masked tile may straddle one multiple of 2³², hence two keys; full ones do not (:meth:`.tables.Entry.spans`).
    """
    low = (first & 0xFFFFFFFF).to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    index = low + offsets.to(tl.uint32)
    key = random_key(seed, step, high)
    if MASKED:
        key = tl.where(index < low, random_key(seed, step, high + 1), key)
    return mix32(index ^ key)


@triton.jit
def stochastic_bf16(value, words):
    """fp32 → bf16, rounded up in magnitude with the probability of what is cut off; the words' low half decides."""
    bits = value.to(tl.int32, bitcast=True) + (words & 0xFFFF).to(tl.int32)
    bits = tl.where(value == value, bits, NAN_BITS)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fp16_unit_bits(weight, FORMAT: tl.constexpr):
    """fp32 pattern of the remainder's unit, a power of two, for an fp16 weight given in fp32."""
    exponent = tl.maximum(weight.to(tl.int32, bitcast=True) & 0x7F800000, 0x38800000)  # at least that of 2**-14
    return exponent - ((25 if FORMAT == "split16" else 17) << 23)


@triton.jit
def join(weight, remainder, FORMAT: tl.constexpr):
    """The fp32 parameter."""
    pattern = weight.to(tl.int16, bitcast=True).to(tl.int32)
    if FORMAT == "master":
        return tl.where(narrow(remainder, weight.dtype) == weight, remainder, weight.to(tl.float32))
    elif weight.dtype == tl.float16:
        wide, low = weight.to(tl.float32), remainder.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        outward = tl.where(wide < 0, -low, low)
        # The lower neighbour of a power of two, from 2**-13 on, is half an ulp away.
        below = ((bits & 0x7FFFFF) == 0) & ((bits & 0x7F800000) >= 0x39000000)
        low = tl.where(below & (outward < (-8192.0 if FORMAT == "split16" else -32.0)), 0.0, low)
        return wide + low * fp16_unit_bits(wide, FORMAT).to(tl.float32, bitcast=True)
    else:
        low = remainder.to(tl.int32)
        if FORMAT == "split8":
            low = low << 8
        high = pattern << 16
        value = (high + low).to(tl.float32, bitcast=True)
        return tl.where(value == value, value, high.to(tl.float32, bitcast=True))  # a NaN: of ±0, by a borrow, or ±inf


@triton.jit
def split_fp16(value, words, FORMAT: tl.constexpr):
    """(weight, remainder as int32)."""
    weight = value.to(tl.float16)
    wide = weight.to(tl.float32)
    inverse_unit = (0x7F000000 - fp16_unit_bits(wide, FORMAT)).to(tl.float32, bitcast=True)
    units = (value - wide) * inverse_unit
    if FORMAT == "split8":  # stochastic rounding: add a random byte below the point, then cut
        return weight, (narrow_integer(units * 256.0) + (words >> 24).to(tl.int32)) >> 8
    else:
        return weight, narrow_integer(units)


@triton.jit
def split_bf16(value, words, FORMAT: tl.constexpr):
    """(weight, remainder as int32)."""
    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), NAN_BITS)
    if FORMAT == "split8":
        bits = (bits + (words >> 24).to(tl.int32)) & -256  # stochastic rounding to a multiple of 2**8
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    if FORMAT == "split8":
        low = low >> 8
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low


@triton.jit
def split(value, words, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """(weight, remainder as int32) of an fp32 parameter; the top byte of ``words`` rounds split8."""
    if dtype == tl.float16:
        return split_fp16(value, words, FORMAT)
    else:
        return split_bf16(value, words, FORMAT)

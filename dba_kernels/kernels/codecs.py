"""Codecs in registers: tiles of stored codes to fp32 and back. Grouped tiles are ``[groups, GROUP]``.

Floats become integers by adding 1.5 · 2²³, which rounds to nearest even without a conversion instruction and without
libdevice; 8- and 16-bit integers become floats by one conversion each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import formats
from .common import GROUP, group_offsets, load, tile_offsets

SMALLEST_SCALE = tl.constexpr(formats.SMALLEST_SCALE)
EXP_AVG_STEP = tl.constexpr(1.0 / formats.EXP_AVG_CODE_MAX**2)
EXP_AVG_SQ_STEP = tl.constexpr(1.0 / formats.EXP_AVG_SQ_CODE_MAX**4)

TWO_23_BITS = tl.constexpr(0x4B000000)  # fp32 pattern of 2**23, whose ulp is 1
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it rounds |x| < 2**22 to an integer in the low mantissa bits


@triton.jit
def widen_nibble(nibbles):
    """Two's complement nibbles in the low four bits of int32."""
    return ((nibbles ^ 8) | TWO_23_BITS).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def decode_fp8_e4m3(codes, scale):
    """e4m3's bits, moved up, are those of an fp16 with an exponent bias 8 larger; exact, subnormals included."""
    bits = codes.to(tl.int8, bitcast=True).to(tl.int16) << 7  # the sign lands in bits 14 and 15; 14 is the exponent's
    return (bits & -0x4001).to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)


@triton.jit
def narrow_integer(value):
    """Nearest integer, ties to even, as the low bits of an int32."""
    return (value + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def narrow_fp8_e4m3(value):
    """Nearest e4m3, ties to even, of |value| ≤ 448 up to rounding."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # rebias 127 to 7
    subnormal = narrow_integer(tl.abs(value) * 512.0) & 0xFF  # units of 2**-9
    return tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)  # below 2**-6


@triton.jit
def scale_and_inverse(absmax, STEP: tl.constexpr):
    """``scale = absmax · STEP`` and its reciprocal, both 0 where the scale would be subnormal."""
    scale = absmax * STEP
    usable = scale >= SMALLEST_SCALE
    return tl.where(usable, scale, 0.0), tl.where(usable, 1.0 / tl.maximum(scale, SMALLEST_SCALE), 0.0)


@triton.jit
def decode_quadratic(wide, scale):
    """value = scale · c·|c|"""
    return wide * tl.abs(wide) * scale


@triton.jit
def decode_exp_avg(codes, scale):
    return decode_quadratic(codes.to(tl.float32), scale)


@triton.jit
def narrow_signed_root(value):
    """c = sign(x) · round(√|x|), as the low bits of an int32."""
    sign = value.to(tl.int32, bitcast=True) & -0x80000000
    root = tl.sqrt(tl.abs(value)).to(tl.int32, bitcast=True)
    return narrow_integer((root | sign).to(tl.float32, bitcast=True))


@triton.jit
def decode_exp_avg_sq(codes, scale):
    """v = scale · c⁴"""
    wide = codes.to(tl.float32)
    square = wide * wide
    return square * square * scale


@triton.jit
def encode_exp_avg(exp_avg):
    """(codes, scale ``[groups, 1]``); no clamp: √(absmax · inverse) rounds to 127."""
    scale, inverse = scale_and_inverse(tl.max(tl.abs(exp_avg), axis=1, keep_dims=True), EXP_AVG_STEP)
    return narrow_signed_root(exp_avg * inverse).to(tl.int8), scale


@triton.jit
def encode_exp_avg_sq(exp_avg_sq):
    """(codes, scale ``[groups, 1]``); c ≥ 1 wherever v > 0, so that no update is divided by ε alone."""
    scale, inverse = scale_and_inverse(tl.max(exp_avg_sq, axis=1, keep_dims=True), EXP_AVG_SQ_STEP)
    root = tl.sqrt(tl.sqrt(exp_avg_sq * inverse))
    floor = tl.where(inverse > 0, 1.0, 0.0)  # [groups, 1]
    return narrow_integer(tl.where(exp_avg_sq > 0, tl.maximum(root, floor), root)).to(tl.uint8), scale


@triton.jit
def decode_int4(packed, scale):
    """Bytes ``[groups, GROUP // 2]``, low nibble first, to ``[groups, GROUP]``."""
    byte = packed.to(tl.int32)
    pairs = tl.join(widen_nibble(byte & 0xF), widen_nibble(byte >> 4))  # [groups, GROUP // 2, 2]
    return decode_quadratic(tl.reshape(pairs, (packed.shape[0], GROUP)), scale)


@triton.jit
def encode_int4(scaled):
    low, high = tl.split(tl.reshape(narrow_signed_root(scaled), (scaled.shape[0], GROUP // 2, 2)))
    return ((low & 0xF) | ((high & 0xF) << 4)).to(tl.uint8)


@triton.jit
def narrow(scaled, FORMAT: tl.constexpr):
    """Codes of 8 bits of values in units of their group's scale."""
    return narrow_signed_root(scaled) if FORMAT == "int8" else narrow_fp8_e4m3(scaled)


@triton.constexpr_function
def stored_dtype(FORMAT):
    """dtype of the codes of a storage, state or remainder format; second moments in int8 state are uint8."""
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "int8": tl.int8, "uint8": tl.uint8}
    names |= {"fp8_e4m3": tl.uint8, "int4": tl.uint8, "split16": tl.int16, "split8": tl.int8, "master": tl.float32}
    return names[FORMAT]


@triton.jit
def load_global(codes_ptr, scale_ptr, weight, start, rows, cols, at, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """``weight · ĝ_G`` of a tile, decoded in registers; the weight joins the scale of a group, once for all of it."""
    if FORMAT == "int4":
        scale = weight * load(scale_ptr, group_offsets(start, rows, cols, MASKED), MASKED)
        bytes_per_row = (cols + 1) // 2
        if MASKED:  # every lane fetches its own byte: fewer registers than to unzip them
            byte = load(codes_ptr, tile_offsets(start, rows, bytes_per_row, GROUP // 2, True, COPIES=2), True)
            nibble = (byte.to(tl.int32) >> (tl.arange(0, GROUP)[None, :] % 2 * 4)) & 0xF
            return decode_quadratic(widen_nibble(nibble), scale)
        else:
            return decode_int4(
                load(codes_ptr, tile_offsets(start, rows, bytes_per_row, GROUP // 2, False), False), scale
            )
    elif FORMAT == "int8":
        scale = weight * load(scale_ptr, group_offsets(start, rows, cols, MASKED), MASKED)
        return decode_quadratic(load(codes_ptr, at, MASKED).to(tl.float32), scale)
    elif FORMAT == "fp8_e4m3":
        scale = weight * load(scale_ptr, group_offsets(start, rows, cols, MASKED), MASKED)
        return decode_fp8_e4m3(load(codes_ptr, at, MASKED), scale)
    else:
        return weight * load(codes_ptr, at, MASKED).to(tl.float32)

"""Codecs of whole tensors: storage of the global gradient and of the optimizer state.

Every grouped codec works on ``[rows, cols]`` in groups of GROUP columns (see :mod:`dba_kernels.formats`), rounds to
nearest even, and stores one fp32 scale per group: the value of code 1. Input is finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import (
    EXP_AVG_CODE_MAX,
    EXP_AVG_SQ_CODE_MAX,
    GROUP,
    SMALLEST_SCALE,
    STORAGE_FORMATS,
    EncodedTensor,
    LowRankTensor,
    StoredTensor,
    matrix_shape,
    storage_format,
)


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    """``[rows, cols]`` padded with zeros to ``[rows, ceil(cols / GROUP), GROUP]``."""
    rows, cols = matrix.shape
    padding = -cols % GROUP
    return F.pad(matrix, (0, padding)).reshape(rows, (cols + padding) // GROUP, GROUP)


def _ungroup(groups: torch.Tensor, cols: int) -> torch.Tensor:
    return groups.flatten(1)[:, :cols].contiguous()


def _scale_and_inverse(absmax: torch.Tensor, value_of_absmax: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale = absmax · fp32(1 / value_of_absmax)`` and its reciprocal; both 0 where the scale would be subnormal."""
    scale = absmax * (1.0 / value_of_absmax)
    usable = scale >= SMALLEST_SCALE
    zero = torch.zeros_like(scale)
    return torch.where(usable, scale, zero), torch.where(usable, 1.0 / scale, zero)


def _quadratic_codes(scaled: torch.Tensor, code_max: float) -> torch.Tensor:
    """int8 ``c = sign(x) · round(√|x|)`` of values in units of their scale."""
    return scaled.abs().sqrt().round().clamp(max=code_max).copysign(scaled).to(torch.int8)


# --- storage of the global gradient -----------------------------------------------------------------------------------


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes in [-7, 7], ``[rows, cols]`` → uint8 ``[rows, ceil(cols / 2)]``: low nibble first."""
    nibbles = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Inverse of :func:`pack_int4`: int8 ``[rows, cols]``; a nibble above 7 is negative."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1)[:, :cols].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def encode(tensor: torch.Tensor, format: str) -> EncodedTensor:
    """Encode a dense tensor.

    int8 and int4 are companded like ``exp_avg``: value = scale · c·|c|, c = sign(x) · round(√(|x| / scale)).

    Error bounds per element, with A the absmax of its group and C the largest code: int8 and int4
    √(|x|·A)/C + A/(2C)² (up to fp32 rounding), fp8_e4m3 max(|x|/16, A·2⁻¹⁰/448); bf16 max(|x|·2⁻⁸, 2⁻¹³⁴), fp16
    max(|x|·2⁻¹¹, 2⁻²⁵) below 65520. A group with A < 2⁻¹²⁶·C^power becomes zeros.

    Args:
        tensor: floating point, any shape. 1-D and small tensors are stored as fp32 whatever ``format`` says.
        format: a name in ``STORAGE_FORMATS``.
    """
    chosen = storage_format(format, tuple(tensor.shape))
    if not chosen.grouped:
        return EncodedTensor(chosen.name, tuple(tensor.shape), tensor.detach().to(chosen.dtype, copy=True).contiguous())
    rows, cols = matrix_shape(tuple(tensor.shape))
    groups = _groups(tensor.detach().to(torch.float32).reshape(rows, cols))
    scale, inverse = _scale_and_inverse(groups.abs().amax(dim=2), chosen.code_max**chosen.power)
    scaled = groups * inverse.unsqueeze(2)
    if chosen.floating is not None:
        codes = _ungroup(scaled, cols).to(chosen.floating).view(torch.uint8)
    else:
        codes = _ungroup(_quadratic_codes(scaled, chosen.code_max), cols)
        if chosen.bits == 4:
            codes = pack_int4(codes)
    return EncodedTensor(chosen.name, tuple(tensor.shape), codes, scale)


def decode(encoded: StoredTensor) -> torch.Tensor:
    """The fp32 tensor that is stored: ``scale · c·|c|`` for integer codes, ``scale · c`` for fp8."""
    if isinstance(encoded, LowRankTensor):
        return rebuild(encoded)
    chosen = STORAGE_FORMATS[encoded.format]
    if not chosen.grouped:
        return encoded.codes.to(torch.float32)
    assert encoded.scales is not None  # every grouped format has them
    cols = matrix_shape(encoded.shape)[1]
    if chosen.floating is not None:
        values = encoded.codes.view(chosen.floating).to(torch.float32)
    else:
        codes = unpack_int4(encoded.codes, cols) if chosen.bits == 4 else encoded.codes
        values = codes.to(torch.float32) * codes.to(torch.float32).abs()
    return _ungroup(_groups(values) * encoded.scales.unsqueeze(2), cols).reshape(encoded.shape)


def truncated_svd(tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U ``[m, r]``, σ ``[r]`` and V ``[n, r]`` of the best rank-r matrix for ``tensor.flatten(1)``, in fp32."""
    u, sigma, vh = torch.linalg.svd(tensor.detach().to(torch.float32).flatten(1), full_matrices=False)
    return u[:, :rank], sigma[:rank].contiguous(), vh[:rank].T


def factorize(tensor: torch.Tensor, rank: int, format: str) -> LowRankTensor:
    """Truncated singular value decomposition of ``tensor.flatten(1)``, factors encoded in ``format``.

    The paper stores ĝ_G so, with r = 512. Only worth its bytes where r < m·n / (m + n).

    Args:
        tensor: ``[m, ...]``, at least 2-D.
        rank: r, 1 ≤ r ≤ min(m, n).
    """
    u, sigma, v = truncated_svd(tensor, rank)
    return LowRankTensor(tuple(tensor.shape), encode(u, format), sigma, encode(v, format))


def rebuild(stored: LowRankTensor) -> torch.Tensor:
    """``U · diag(sigma) · Vᵀ`` in fp32, in the tensor's own shape."""
    return ((decode(stored.u) * stored.sigma) @ decode(stored.v).T).reshape(stored.shape)


# --- optimizer state --------------------------------------------------------------------------------------------------


def encode_exp_avg(exp_avg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``[rows, cols]`` and scales: m ≈ scale · c·|c|, scale = absmax / 127².

    Quadratic companding keeps small elements of a group that also holds a large one:
    |error| ≤ √(|m|·A)/127 + A/(2·127)², A the group's absmax (up to fp32 rounding).
    """
    rows, cols = matrix_shape(tuple(exp_avg.shape))
    groups = _groups(exp_avg.to(torch.float32).reshape(rows, cols))
    scale, inverse = _scale_and_inverse(groups.abs().amax(dim=2), float(EXP_AVG_CODE_MAX**2))
    return _ungroup(_quadratic_codes(groups * inverse.unsqueeze(2), EXP_AVG_CODE_MAX), cols), scale


def decode_exp_avg(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    wide = _groups(codes.to(torch.float32))
    return _ungroup(wide * wide.abs() * scales.unsqueeze(2), codes.shape[1]).reshape(shape)


def encode_exp_avg_sq(exp_avg_sq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes ``[rows, cols]`` and scales: v ≈ scale · c⁴, scale = max / 255⁴, c ≥ 1 wherever v > 0.

    The floor matters: a v that rounded to 0 would divide the update by eps. A v below it decodes larger than it is,
    which makes the step smaller. With x = (v/scale)^¼, √v is off by at most (x + ¼)/x² relative: 0.4 % at the maximum
    of the group (x = 255), 4 % where √v is a hundredth of it.
    """
    rows, cols = matrix_shape(tuple(exp_avg_sq.shape))
    groups = _groups(exp_avg_sq.to(torch.float32).reshape(rows, cols))
    scale, inverse = _scale_and_inverse(groups.amax(dim=2), float(EXP_AVG_SQ_CODE_MAX**4))
    inverse = inverse.unsqueeze(2)
    codes = (groups * inverse).sqrt().sqrt().round().clamp(max=EXP_AVG_SQ_CODE_MAX)
    codes = torch.where((groups > 0) & (inverse > 0), codes.clamp(min=1.0), codes)
    return _ungroup(codes, cols).to(torch.uint8), scale


def encode_moments(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, scales) of ``exp_avg`` and (codes, scales) of ``exp_avg_sq``, as two encodings of one state.

    A group whose second moment has left fp32 starts anew with moments of 0: an infinite scale would make its 64 weights
    NaN, and torch would never move the one weight again.
    """
    codes, scales = encode_exp_avg(exp_avg)
    codes_sq, scales_sq = encode_exp_avg_sq(exp_avg_sq)
    fits = torch.isfinite(scales_sq)
    return codes, scales.where(fits, 0.0), codes_sq, scales_sq.where(fits, 0.0)


def decode_exp_avg_sq(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    squares = _groups(codes.to(torch.float32)).square()
    return _ungroup(squares.square() * scales.unsqueeze(2), codes.shape[1]).reshape(shape)

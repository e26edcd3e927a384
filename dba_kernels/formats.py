"""Formats of everything that is stored: the global gradient, the optimizer state and the parameters.

Plain data without arithmetic, so that every backend may import it and none has to share code with another.

Layout shared by all grouped (8- and 4-bit) formats: a tensor is read as a matrix, ``tensor.flatten(1)``, with
``rows = shape[0]``; the columns of each row are cut into groups of :data:`GROUP`, the last one ragged. A group never
crosses a row, so a tensor sharded by rows is a view of the codes and scales of the whole tensor.
"""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass
from typing import Any

import torch

GROUP = 64
"""Columns that share one fp32 scale. ``python -m bench.codecs`` prints the table that chose it."""

MIN_COMPRESSED_NUMEL = 4096
"""Tensors with fewer elements, and 1-D tensors of any size, are kept in fp32: they are norms and biases, few bytes."""

SMALLEST_SCALE = 2.0**-126
"""Groups whose scale would be subnormal are stored as zeros: GPUs and CPUs disagree on subnormal arithmetic."""

SQUARED_NORM_LIMIT = 0.999e36
"""A gradient tensor with a norm of 1e18 or more counts as non-finite, in every backend alike: beyond, squares and
second moments leave fp32. Just below 1e36, so that 1e18 rounded to bf16 counts too."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, cols)`` of ``tensor.flatten(1)``; a 0-D tensor is one row of one column."""
    if len(shape) == 0:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def scales_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``[rows, ceil(cols / GROUP)]``."""
    rows, cols = matrix_shape(shape)
    return rows, -(-cols // GROUP)


Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""


@dataclass(frozen=True)
class StorageFormat:
    """How one dense tensor of the global gradient is stored.

    Args:
        name: the public name.
        dtype: dtype of the codes (the values themselves where ``code_max`` is None).
        bits: stored bits per element, scales not included.
        code_max: for grouped formats the largest magnitude of a code. 0 where elements are stored as plain floats.
        power: companding of grouped formats: ``value = scale · sign(c) · |c|^power``, so that
            ``scale = absmax / code_max^power`` is the value of code 1. Integer codes are quadratic because Adam
            normalises every element: the small entries of a group count as much as the large one that sets its scale
            (``python -m bench.codecs``).
        floating: for formats whose codes are the bits of an 8-bit float, torch's dtype of that.
    """

    name: str
    dtype: torch.dtype
    bits: int
    code_max: float = 0.0
    power: int = 1
    floating: torch.dtype | None = None

    @property
    def grouped(self) -> bool:
        return self.code_max > 0

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``[rows, cols]``; ``[rows, ceil(cols / 2)]`` for int4; the tensor's own shape for plain floats."""
        if not self.grouped:
            return tuple(shape)
        rows, cols = matrix_shape(shape)
        return rows, (-(-cols // 2) if self.bits == 4 else cols)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes per element, scales of full groups included."""
        return self.bits / 8 + (4 / GROUP if self.grouped else 0)


STORAGE_FORMATS = {  # in the order of their numbers in csrc/formats.h
    f.name: f
    for f in (
        StorageFormat("fp32", torch.float32, 32),
        StorageFormat("bf16", torch.bfloat16, 16),
        StorageFormat("fp16", torch.float16, 16),
        StorageFormat("fp8_e4m3", torch.uint8, 8, 448.0, floating=torch.float8_e4m3fn),
        StorageFormat("int8", torch.int8, 8, 127.0, power=2),
        StorageFormat("int4", torch.uint8, 4, 7.0, power=2),
    )
}


@dataclass(frozen=True)
class StateFormat:
    """How the two moments of a parameter are stored.

    Args:
        name: the public name.
        exp_avg, exp_avg_sq: dtypes of the codes (the values themselves where there are no groups).
        grouped: whether the codes are ``[rows, cols]`` with one fp32 scale per group.
        stochastic: whether exp_avg_sq is rounded stochastically.
    """

    name: str
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    grouped: bool = False
    stochastic: bool = False

    def parts(self, shape: tuple[int, ...], param_dtype: torch.dtype = torch.float32) -> Parts:
        """The tensors that hold the moments of a parameter of ``shape``, by their key in its state."""
        if not self.grouped:
            wide = param_dtype == torch.float64
            dtypes = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
            return {key: (tuple(shape), torch.float64 if wide else dtype) for key, dtype in dtypes.items()}
        matrix, scales = matrix_shape(shape), scales_shape(shape)
        return {
            "exp_avg": (matrix, self.exp_avg),
            "exp_avg_sq": (matrix, self.exp_avg_sq),
            "exp_avg_scale": (scales, torch.float32),
            "exp_avg_sq_scale": (scales, torch.float32),
        }

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes per element of both moments, scales of full groups included."""
        return self.exp_avg.itemsize + self.exp_avg_sq.itemsize + (8 / GROUP if self.grouped else 0)


STATE_FORMATS = {
    f.name: f
    for f in (
        StateFormat("fp32", torch.float32, torch.float32),
        StateFormat("bf16", torch.bfloat16, torch.bfloat16, stochastic=True),
        StateFormat("int8", torch.int8, torch.uint8, grouped=True),
    )
}


@dataclass(frozen=True)
class ParamFormat:
    """What a parameter below fp32 keeps beside its weight.

    Args:
        name: the public name.
        remainder: dtype of the remainder, of the parameter's shape; None for none.
        stochastic: whether the remainder is rounded stochastically.
    """

    name: str
    remainder: torch.dtype | None = None
    stochastic: bool = False

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes per element of the remainder."""
        return 0 if self.remainder is None else self.remainder.itemsize


PARAM_FORMATS = {
    f.name: f
    for f in (
        ParamFormat("native"),
        ParamFormat("split16", torch.int16),
        ParamFormat("split8", torch.int8, stochastic=True),
        ParamFormat("master", torch.float32),
    )
}

EXP_AVG_CODE_MAX = 127
"""int8 exp_avg: ``m = scale · c·|c|``, c in [-127, 127] (signed quadratic companding)."""
EXP_AVG_SQ_CODE_MAX = 255
"""uint8 exp_avg_sq: ``v = scale · c⁴``, c in [0, 255], c ≥ 1 wherever v > 0 in a group that is not stored as zeros."""


def is_compressible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this (global) shape takes the chosen compressed format; else it stays fp32."""
    return len(shape) >= 2 and math.prod(shape) >= MIN_COMPRESSED_NUMEL


def check_name(kind: str, name: str, known: Any) -> str:
    """``name`` if it is one of ``known``.

    Raises:
        ValueError: naming the argument, what was expected and what it got.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind}: expected one of {', '.join(map(repr, known))}; got {type(name).__name__}")
    if name not in known:
        raise ValueError(f"{kind}: expected one of {', '.join(map(repr, known))}; got {name!r}")
    return name


def check_type(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """Refuse another kind of object.

    Raises:
        TypeError: naming the argument, what was expected and what it got.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise TypeError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {type(value).__name__}")


def check_path(name: str, value: Any) -> None:
    """Refuse what is no path of a file.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """
    check_type(name, value, (str, os.PathLike))
    if not os.fspath(value) or "\0" in str(value):
        raise ValueError(f"{name}: expected the path of a file, got {value!r}")


def check_iterable(name: str, value: Any, of: str) -> Any:
    """``value``, if one can iterate over it.

    Raises:
        TypeError: naming the argument, what was expected and what it got.
    """
    if not hasattr(value, "__iter__") or (isinstance(value, torch.Tensor) and value.dim() == 0):
        raise TypeError(f"{name}: expected {of}, got {type(value).__name__}")
    return value


def check_count(name: str, value: Any) -> int:
    """``value``, a number or a tensor of one, as an integer of at least 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """
    number = check_number(name, value, "a whole number >= 0")
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    if number != int(number):
        raise ValueError(f"{name}: expected a whole number, got {value}")
    return int(value)


def check_tensor_of_one(name: str, value: Any) -> None:
    """Refuse what is no real number in a tensor.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """
    check_type(name, value, torch.Tensor)
    if value.numel() != 1 or value.is_complex() or value.device.type == "meta" or value.layout != torch.strided:
        raise ValueError(f"{name}: expected a tensor of one number, got {value.dtype} of shape {tuple(value.shape)}")


def check_integer(name: str, value: Any, least: int) -> int:
    """``value`` if it is an integer of at least ``least``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
    number = operator.index(value)
    if not least <= number < 2**63:
        raise ValueError(f"{name}: expected at least {least} and less than 2**63, got {number}")
    return number


def check_number(name: str, value: Any, what: str = "a number") -> float:
    """``value`` as a float, if it is a number or a tensor of one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.device.type == "meta":
            shape = tuple(value.shape)
            raise ValueError(f"{name}: expected {what} or a tensor of one element, got {value.dtype} of shape {shape}")
        return float(value)
    if isinstance(value, (str, bytes, bool, type)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    try:
        return float(value)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{name}: expected {what}, got {error}") from error


def storage_format(name: str, shape: tuple[int, ...]) -> StorageFormat:
    """The format that a tensor of ``shape`` really gets when ``name`` is asked for."""
    check_name("format", name, STORAGE_FORMATS)
    return STORAGE_FORMATS[name if is_compressible(shape) else "fp32"]


@dataclass(frozen=True)
class EncodedTensor:
    """A dense tensor in one of :data:`STORAGE_FORMATS`.

    Args:
        format: name of the format.
        shape: shape of the decoded tensor.
        codes: ``format.codes_shape(shape)``; int4 holds two codes per byte along the row, low nibble first.
        scales: fp32 :func:`scales_shape` for grouped formats, else None.
    """

    format: str
    shape: tuple[int, ...]
    codes: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to(self, device: torch.device | str) -> EncodedTensor:
        scales = None if self.scales is None else self.scales.to(device)
        return EncodedTensor(self.format, self.shape, self.codes.to(device), scales)

    def scaled(self, factor: float) -> EncodedTensor:
        """``factor`` times the tensor; codes are shared where there are scales."""
        if self.scales is None:
            return EncodedTensor(self.format, self.shape, self.codes * factor)
        return EncodedTensor(self.format, self.shape, self.codes, self.scales * factor)

    def row_slice(self, start: int, stop: int) -> EncodedTensor:
        """Rows ``start:stop`` of dimension 0, a view: groups and packed nibbles never cross a row."""
        scales = None if self.scales is None else self.scales[start:stop]
        return EncodedTensor(self.format, (stop - start, *self.shape[1:]), self.codes[start:stop], scales)


@dataclass(frozen=True)
class LowRankTensor:
    """``U · diag(sigma) · Vᵀ`` of ``tensor.flatten(1)``: u ``[rows, r]``, sigma fp32 ``[r]``, v ``[cols, r]``."""

    shape: tuple[int, ...]
    u: EncodedTensor
    sigma: torch.Tensor
    v: EncodedTensor

    @property
    def format(self) -> str:
        return "lowrank"

    @property
    def rank(self) -> int:
        return self.sigma.numel()

    @property
    def device(self) -> torch.device:
        return self.sigma.device

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.sigma.nbytes + self.v.nbytes

    def to(self, device: torch.device | str) -> LowRankTensor:
        return LowRankTensor(self.shape, self.u.to(device), self.sigma.to(device), self.v.to(device))

    def scaled(self, factor: float) -> LowRankTensor:
        return LowRankTensor(self.shape, self.u, self.sigma * factor, self.v)

    def row_slice(self, start: int, stop: int) -> LowRankTensor:
        return LowRankTensor((stop - start, *self.shape[1:]), self.u.row_slice(start, stop), self.sigma, self.v)


StoredTensor = EncodedTensor | LowRankTensor

"""Formats of everything that is stored: the global gradient, the optimizer state and the parameters.

Plain data without arithmetic, so that every backend may import it and none has to share code with another.

Layout shared by all grouped (8- and 4-bit) formats: a tensor is read as a matrix, ``tensor.flatten(1)``, with
``rows = shape[0]``; the columns of each row are cut into groups of :data:`GROUP`, the last one ragged. A group never
crosses a row, so a tensor sharded by rows is a view of the codes and scales of the whole tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    """

    name: str
    dtype: torch.dtype
    bits: int
    code_max: float = 0.0
    power: int = 1

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


STORAGE_FORMATS = {
    f.name: f
    for f in (
        StorageFormat("fp32", torch.float32, 32),
        StorageFormat("bf16", torch.bfloat16, 16),
        StorageFormat("fp16", torch.float16, 16),
        StorageFormat("fp8_e4m3", torch.uint8, 8, 448.0),
        StorageFormat("int8", torch.int8, 8, 127.0, power=2),
        StorageFormat("int4", torch.uint8, 4, 7.0, power=2),
    )
}
STATE_FORMATS = ("fp32", "bf16", "int8")
PARAM_FORMATS = ("native", "split16", "split8", "master")
REMAINDER_DTYPES = {"split16": torch.int16, "split8": torch.int8, "master": torch.float32}

EXP_AVG_CODE_MAX = 127
"""int8 exp_avg: ``m = scale · c·|c|``, c in [-127, 127] (signed quadratic companding)."""
EXP_AVG_SQ_CODE_MAX = 255
"""uint8 exp_avg_sq: ``v = scale · c⁴``, c in [0, 255], c ≥ 1 wherever v > 0 in a group that is not stored as zeros."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, cols)`` of ``tensor.flatten(1)``; a 0-D tensor is one row of one column."""
    if len(shape) == 0:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def scales_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``[rows, ceil(cols / GROUP)]``."""
    rows, cols = matrix_shape(shape)
    return rows, -(-cols // GROUP)


def is_compressible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this (global) shape takes the chosen compressed format; else it stays fp32."""
    return len(shape) >= 2 and math.prod(shape) >= MIN_COMPRESSED_NUMEL


def check_name(kind: str, name: str, known: Any) -> str:
    """``name`` if it is one of ``known``.

    Raises:
        ValueError: naming the argument, what was expected and what it got.
    """
    if name not in known:
        raise ValueError(f"{kind}: expected one of {', '.join(map(repr, known))}; got {name!r}")
    return name


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

    def row_slice(self, start: int, stop: int) -> LowRankTensor:
        return LowRankTensor((stop - start, *self.shape[1:]), self.u.row_slice(start, stop), self.sigma, self.v)


StoredTensor = EncodedTensor | LowRankTensor


class Coefficient:
    """Columns of the coefficient table, float64 ``[n_params, Coefficient.COUNT]``.

    The table carries everything that changes between steps, one row per parameter, so one launch serves parameters
    of different groups and nothing is recompiled or synchronised. Derived factors are computed once, in float64.
    """

    GRAD_WEIGHT = 0  # a · clip factor / loss scale; negative under maximize
    GLOBAL_WEIGHT = 1  # b
    BETA1 = 2
    ONE_MINUS_BETA1 = 3  # a column of its own: fp32(1 - fp32(0.999)) is off by 1e-5
    BETA2 = 4
    ONE_MINUS_BETA2 = 5
    STEP_SIZE = 6  # η_t · α_t / (1 − β₁^k)
    INV_SQRT_BIAS_CORRECTION2 = 7  # 1 / √(1 − β₂^k)
    EPS = 8
    LR_WEIGHT_DECAY = 9  # η_t · λ
    STEP = 10  # k, steps of this parameter with this one; keys the stochastic rounding
    SKIP = 11  # not 0: leave everything untouched
    COUNT = 12


class Hyper:
    """Columns of the hyperparameter table, float64 ``[n_groups, Hyper.COUNT]``."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    SIGN = 5  # -1 under maximize
    COUNT = 6


class Summary:
    """Entries of the whole-model summary that a step leaves behind, float64 ``[Summary.COUNT]``."""

    GAMMA = 0
    CLIP_FACTOR = 1
    GRAD_NORM = 2  # ‖g_D‖ after unscaling, before clipping; 0 when no reduction ran
    GLOBAL_NORM = 3  # ‖ĝ_G‖ of what is stored, over the parameters of this step
    COUNT = 4


CORRECTIONS = ("cosine", "none", "agem", "pcgrad")
CORRECTION_SCOPES = ("tensor", "global")


@dataclass(frozen=True)
class StepSettings:
    """What does not change during a run; the README's symbols in brackets.

    Args:
        boost: k₀ of eq. 2.
        total_steps: T, optimizer steps. 0 where there is no global gradient.
        boost_max: upper clamp of γ.
        correction: one of :data:`CORRECTIONS`.
        scope: one of :data:`CORRECTION_SCOPES`.
        bounds: (α_min, α_max).
        max_grad_norm: clip threshold of ‖g_D‖; None for none.
        reduce: whether the sums exist (there is a global gradient or a clip threshold); without them a non-finite
            gradient is not noticed, as in torch.
    """

    boost: float = 0.0
    total_steps: int = 0
    boost_max: float = 0.5
    correction: str = "none"
    scope: str = "tensor"
    bounds: tuple[float, float] = (0.0, 2.0)
    max_grad_norm: float | None = None
    reduce: bool = False


@dataclass(frozen=True)
class StepTables:
    """Everything of a step that is not per element, on one device: n parameters, G groups, m ≤ n active parameters.

    Args:
        sums: float64 ``[n, 2]``, ⟨g_D, ĝ_G⟩ and ‖g_D‖² of the gradients as they are.
        global_sq: float64 ``[n]``, ‖ĝ_G‖² of what is stored; −1 for a parameter without a global gradient, which is
            updated by plain AdamW (a = α = 1, b = 0).
        hyper: float64 ``[G, Hyper.COUNT]``.
        group: int64 ``[n]``, each parameter's row of ``hyper``.
        active: int64 ``[m]``, rows of the parameters that have a gradient in this step.
        steps: fp32 ``[n]``, steps done per parameter.
        bias_corrections: float64 ``[n, 2]``, 1 − β₁^k and 1 − β₂^k, kept as the EMA of 1: c ← βc + (1−β).
        counters: int64 ``[2]``, optimizer steps done (the t of γ_t) and steps skipped.
        table: float64 ``[n, Coefficient.COUNT]``.
        report: float64 ``[n, 2]``, φ and α of each parameter (φ 0, α 1 without ĝ_G).
        summary: float64 ``[Summary.COUNT]``.
    """

    sums: torch.Tensor
    global_sq: torch.Tensor
    hyper: torch.Tensor
    group: torch.Tensor
    active: torch.Tensor
    steps: torch.Tensor
    bias_corrections: torch.Tensor
    counters: torch.Tensor
    table: torch.Tensor
    report: torch.Tensor
    summary: torch.Tensor


@dataclass
class TensorBatch:
    """Parameters of one dtype and format combination on one device: what one launch updates.

    Lists run in parallel, one entry per parameter; a list is empty where the format has no such part.

    Args:
        param_format, state_format: names in :data:`PARAM_FORMATS` and :data:`STATE_FORMATS`.
        global_format: name in :data:`STORAGE_FORMATS`, ``"lowrank"``, or ``"none"``.
        params: updated in place.
        remainders: int16 / int8 / fp32 of the parameter's shape for split16 / split8 / master.
        exp_avgs, exp_avg_sqs: fp32 or bf16 of the parameter's shape, or int8 / uint8 ``[rows, cols]``.
        exp_avg_scales, exp_avg_sq_scales: fp32 :func:`scales_shape` for int8 state.
        global_grads: the stored tensors, :class:`EncodedTensor`; :class:`LowRankTensor` only above the backends.
        index: int64 ``[n]``, each parameter's row in the coefficient table.
        seeds: 32-bit seed of each parameter's stochastic rounding (split8 remainders, bf16 exp_avg_sq).
        offsets: position of element 0 in the flattened whole parameter (not 0 only for a row shard).
        cache: scratch that a backend keeps between steps (pointer and chunk tables), keyed by the backend.
    """

    param_format: str
    state_format: str
    global_format: str
    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    index: torch.Tensor
    remainders: list[torch.Tensor] = field(default_factory=list)
    exp_avg_scales: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sq_scales: list[torch.Tensor] = field(default_factory=list)
    global_grads: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)

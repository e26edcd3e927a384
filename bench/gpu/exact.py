"""What a step must write, in float64 on the device, and how far a GPU's fp32 arithmetic may be from it.

Every result comes with a running error bound, element by element: each operation of the kernel adds its own rounding
and passes on what its operands were off by. No share of elements is allowed to be worse, no largest term stands in
for the others, and what a codec rounds is compared with the value before it was rounded. The bounds per operation are
those that NVIDIA's PTX manual states; correctly rounded operations and fused multiply-adds are within half an ulp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dba_kernels.formats import (
    EXP_AVG_CODE_MAX,
    EXP_AVG_SQ_CODE_MAX,
    GROUP,
    SMALLEST_SCALE,
    STORAGE_FORMATS,
    EncodedTensor,
    matrix_shape,
)
from dba_kernels.reference import quantize, remainder
from dba_kernels.stepdata import Coefficient, ParamTensors, TensorBatch

HALF_ULP = 2.0**-24
SQRT = 2.0**-23
RSQRT = 2.0**-22.9
DIVISION = 2.0**-22
"""Relative errors: an operation rounded to nearest; sqrt.approx.ftz; rsqrt.approx.ftz; div.full (2 ulp)."""
ROOT_FLOOR = 2.0**-63
"""sqrt.approx.ftz takes a subnormal for zero: the root of the smallest normal number is lost at most."""
SMALLEST = 2.0**-126
SECOND_ORDER = 1.01
"""The bounds are first order in errors of at most some 2⁻²⁰; one percent covers the rest many times over."""
STEP_OF = {torch.bfloat16: (2.0**-7, 2.0**-133), torch.float16: (2.0**-10, 2.0**-24)}
SPLIT8_STEP = {torch.bfloat16: (2.0**-15, 2.0**-141), torch.float16: (2.0**-17, 2.0**-31)}
FP16_SPLIT16_FLOOR = 2.0**-39
"""Spacing of the narrow formats, relative to the value at most and absolute among subnormals; see tests/support."""


@dataclass(frozen=True)
class Bounded:
    """A float64 result and by how much fp32 arithmetic may miss it."""

    value: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class Expected:
    """Results of one step of one tensor before anything is narrowed."""

    exp_avg: Bounded
    exp_avg_sq: Bounded
    param: Bounded


def _root(square: Bounded) -> Bounded:
    """√x: what the operand is off by, whatever its relative size, and the instruction's own error."""
    root = square.value.sqrt()
    low = (square.value - square.error).clamp(min=0.0).sqrt()
    passed_on = torch.where(square.error > 0, square.error / (root + low).clamp(min=1e-300), 0.0)
    passed_on = torch.minimum(passed_on, square.error.sqrt() + 0.0 * root)
    return Bounded(root, passed_on + SQRT * root + ROOT_FLOOR)


def _state(batch: TensorBatch, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments as they are stored, decoded in float64."""
    tensor = batch.tensors[i]
    first, second = tensor.exp_avg.double(), tensor.exp_avg_sq.double()
    if batch.state_format != "int8":
        return first, second
    shape = tensor.param.shape
    first, second = first * first.abs(), second.square().square()
    scaled = [
        _per_element(scales.double(), codes.shape[1]) * codes
        for codes, scales in ((first, tensor.exp_avg_scale), (second, tensor.exp_avg_sq_scale))
    ]
    return scaled[0].reshape(shape), scaled[1].reshape(shape)


def _per_element(per_group: torch.Tensor, cols: int) -> torch.Tensor:
    """``[rows, groups]`` → ``[rows, cols]``."""
    return per_group.repeat_interleave(GROUP, dim=1)[:, :cols]


def stored(encoded: Any) -> torch.Tensor:
    """ĝ_G in float64; the codes and scales are exact there."""
    if encoded.scales is None:
        return encoded.codes.double()
    cols = matrix_shape(encoded.shape)[1]
    if encoded.format == "fp8_e4m3":
        codes = encoded.codes.view(torch.float8_e4m3fn).double()
    else:
        codes = (quantize.unpack_int4(encoded.codes, cols) if encoded.format == "int4" else encoded.codes).double()
        codes = codes * codes.abs()
    return (codes * _per_element(encoded.scales.double(), cols)).reshape(encoded.shape)


def _param(batch: TensorBatch, i: int) -> torch.Tensor:
    if batch.param_format == "native":
        return batch.tensors[i].param.double()
    return remainder.join(batch.tensors[i].param, batch.tensors[i].remainder, batch.param_format).double()


def expected(batch: TensorBatch, grad: torch.Tensor, table: torch.Tensor, i: int) -> Expected:
    """Eqs. 3, 7 and 8 for tensor ``i`` of a batch that the step has not yet touched."""
    u = HALF_ULP
    row = table[batch.tensors[i].index].float().double()  # kernels read the coefficients in fp32
    c = {name: row[getattr(Coefficient, name)] for name in vars(Coefficient) if name.isupper() and name != "COUNT"}
    encoded = batch.tensors[i].global_grad
    own = c["GRAD_WEIGHT"] * grad.double()
    joining = c["GLOBAL_WEIGHT"] * stored(encoded) if encoded is not None else torch.zeros_like(own)
    boosted = own + joining  # eq. 3
    off = u * (own.abs() + 2 * joining.abs() + boosted.abs())
    first, second = _state(batch, i)

    decayed, entering = c["BETA1"] * first, c["ONE_MINUS_BETA1"] * boosted  # eq. 7
    m = decayed + entering
    m_off = u * (2 * decayed.abs() + entering.abs() + m.abs()) + c["ONE_MINUS_BETA1"] * off
    decayed, entering = c["BETA2"] * second, c["ONE_MINUS_BETA2"] * boosted.square()
    v = decayed + entering
    v_off = u * (3 * decayed + 2 * entering + v) + c["ONE_MINUS_BETA2"] * (2 * boosted.abs() * off + off.square())
    v_off = v_off + SMALLEST * 2.0**-23  # a square that leaves the normal range

    root = _root(Bounded(v, v_off))
    scaled = root.value * c["INV_SQRT_BIAS_CORRECTION2"]
    denominator = scaled + c["EPS"]
    denominator_off = root.error * c["INV_SQRT_BIAS_CORRECTION2"] + u * (scaled + denominator)
    update = c["STEP_SIZE"] * m / denominator  # eq. 8
    smallest = (denominator - denominator_off).clamp(min=1e-300)
    update_off = c["STEP_SIZE"].abs() * (m_off + m.abs() * denominator_off / denominator) / smallest
    update_off = update_off + update.abs() * (2 * RSQRT + 3 * u)  # an approximate root of the inverse, squared
    before = _param(batch, i)
    decay = c["LR_WEIGHT_DECAY"] * before
    param = before - (decay + update)
    param_off = update_off + u * (before.abs() + decay.abs() + (decay + update).abs() + param.abs())

    def bounded(value: torch.Tensor, error: torch.Tensor) -> Bounded:
        return Bounded(value, SECOND_ORDER * error + SMALLEST)

    return Expected(bounded(m, m_off), bounded(v, v_off), bounded(param, param_off))


# --- what was written -------------------------------------------------------------------------------------------------


def check_step(after: TensorBatch, i: int, want: Expected, table: torch.Tensor) -> None:
    """Tensor ``i`` after the step.

    Raises:
        AssertionError: naming what is off, the first element of it, and how far it is over its bound.
    """
    tensor = after.tensors[i]
    step = int(table[tensor.index, Coefficient.STEP])
    _check_moments(tensor, after.state_format, want, step)
    _check_param(tensor, after.param_format, want.param, step)


def _check_moments(tensor: ParamTensors, state_format: str, want: Expected, step: int) -> None:
    first, second = tensor.exp_avg, tensor.exp_avg_sq
    if state_format == "int8":
        _check_codes("exp_avg", first, tensor.exp_avg_scale, want.exp_avg, EXP_AVG_CODE_MAX, 2)
        _check_codes("exp_avg_sq", second, tensor.exp_avg_sq_scale, want.exp_avg_sq, EXP_AVG_SQ_CODE_MAX, 4)
        return
    if state_format == "fp32":
        _within("exp_avg", first, want.exp_avg)
        _within("exp_avg_sq", second, want.exp_avg_sq)
        return
    _within("exp_avg", first, want.exp_avg, 0.5, STEP_OF[torch.bfloat16])
    _within("exp_avg_sq", second, want.exp_avg_sq, 1.0, STEP_OF[torch.bfloat16])
    words = remainder.random_words(tuple(first.shape), tensor.seed, step, tensor.offset, first.device)
    rounded = remainder.stochastic_bf16(want.exp_avg_sq.value.float(), words)
    _few("exp_avg_sq, stochastic rounding", second, rounded, want.exp_avg_sq, STEP_OF[torch.bfloat16])


def _check_param(tensor: ParamTensors, kind: str, want: Bounded, step: int) -> None:
    param = tensor.param
    if kind == "native":
        if param.dtype == torch.float32:
            _within("param", param, want)
        else:
            _within("param", param, want, 0.5, STEP_OF[param.dtype])
        return
    rest = tensor.remainder
    joined = remainder.join(param, rest, kind)
    random = None
    if kind == "split8":
        _within("param with remainder", joined, want, 1.0, SPLIT8_STEP[param.dtype], param)
        words = remainder.random_words(tuple(param.shape), tensor.seed, step, tensor.offset, param.device)
        cut = remainder.split(want.value.float(), param.dtype, kind, words >> 24)
        _few("param, stochastic rounding", joined, remainder.join(*cut, kind), want, SPLIT8_STEP[param.dtype])
    else:
        floor = FP16_SPLIT16_FLOOR if (kind, param.dtype) == ("split16", torch.float16) else 0.0
        _within("param with remainder", joined, Bounded(want.value, want.error + floor))
    if kind == "split8" and param.dtype == torch.float16:
        return  # stochastic rounding may carry a remainder to the end of its range, which another weight begins
    weight, again = remainder.split(joined, param.dtype, kind, random)
    _same("weight of the pair", param, weight)
    _same("remainder of the pair", rest, again)


def _check_codes(
    name: str, codes: torch.Tensor, scales: torch.Tensor, want: Bounded, code_max: int, power: int
) -> None:
    """``value = scale · c^power``: the scale of the group's largest value, and codes nearest to what they stand for."""
    rows, cols = codes.shape
    value, error = want.value.reshape(rows, cols), want.error.reshape(rows, cols)
    if codes.numel() == 0:
        return
    largest, spare = _group_max(value.abs()), _group_max(error)
    exact = largest / code_max**power
    slack = spare / code_max**power + 2 * HALF_ULP * exact
    usable = scales > 0
    wrong = torch.where(usable, (scales.double() - exact).abs() > slack, exact - slack >= SMALLEST_SCALE)
    _none(f"scale of {name}", wrong, scales, exact, slack)

    scale = _per_element(torch.where(usable, scales.double(), 1.0), cols)
    usable = _per_element(usable.double(), cols) > 0
    scaled = Bounded(value.abs() / scale, error / scale + value.abs() / scale * (DIVISION + 2 * HALF_ULP))
    at = _root(scaled)
    if power == 4:
        at = _root(at)
        at = Bounded(torch.where(value > 0, at.value.clamp(min=1.0), at.value), at.error)
    signed = at.value.copysign(value) if power == 2 else at.value
    slack = 0.5 + at.error + HALF_ULP * at.value
    if power == 4:  # what may be zero or not may have the code 0 or 1
        slack = torch.where(value <= error, slack.clamp(min=1.0), slack)
    wrong = torch.where(usable, (codes.double() - signed).abs() > slack, codes != 0)
    _none(f"codes of {name}", wrong, codes, signed, slack)


def _group_max(matrix: torch.Tensor) -> torch.Tensor:
    """``[rows, cols]`` → the largest of each group, ``[rows, groups]``; nothing is negative."""
    padding = -matrix.shape[1] % GROUP
    return torch.nn.functional.pad(matrix, (0, padding)).unflatten(1, (-1, GROUP)).amax(2)


def check_encoding(tensor: torch.Tensor, encoded: EncodedTensor) -> None:
    """Codes nearest to the dense values, of scales that are the group's largest value's.

    Raises:
        AssertionError: as :func:`check_step`.
    """
    chosen = STORAGE_FORMATS[encoded.format]
    if not chosen.grouped:
        _same(f"{encoded.format} codes", encoded.codes, tensor.to(chosen.dtype))
        return
    assert encoded.scales is not None
    rows, cols = matrix_shape(encoded.shape)
    value = Bounded(tensor.double(), torch.zeros_like(tensor, dtype=torch.float64))
    if encoded.format != "fp8_e4m3":
        codes = quantize.unpack_int4(encoded.codes, cols) if encoded.format == "int4" else encoded.codes
        _check_codes(encoded.format, codes, encoded.scales, value, int(chosen.code_max), 2)
        return
    codes = encoded.codes.view(torch.float8_e4m3fn).double()
    scale = _per_element(encoded.scales.double(), cols)
    scaled = torch.where(scale > 0, value.value.reshape(rows, cols) / scale, 0.0)
    near = 0.5 * torch.maximum(_spacing(codes, (2.0**-3, 2.0**-9)), _spacing(scaled, (2.0**-3, 2.0**-9)))
    slack = near + scaled.abs() * (DIVISION + HALF_ULP)
    _none("fp8_e4m3 codes", ~((codes - scaled).abs() <= slack), codes, scaled, slack)


def check_decoding(encoded: EncodedTensor, dense: torch.Tensor) -> None:
    """fp32 values of what is stored: two roundings.

    Raises:
        AssertionError: as :func:`check_step`.
    """
    want = stored(encoded)
    _within(f"decoded {encoded.format}", dense, Bounded(want, 2 * HALF_ULP * want.abs() + SMALLEST))


def check_accumulated(before: torch.Tensor, grad: torch.Tensor, weight: float, after: torch.Tensor) -> None:
    """total + weight · grad, two roundings.

    Raises:
        AssertionError: as :func:`check_step`.
    """
    added = weight * grad.double()
    want = before.double() + added
    _within("total", after, Bounded(want, HALF_ULP * (2 * added.abs() + want.abs()) + SMALLEST))


# --- comparisons ------------------------------------------------------------------------------------------------------


def _spacing(value: torch.Tensor, step: tuple[float, float]) -> torch.Tensor:
    """Distance of neighbours in a format of which (relative, absolute) spacing is at most ``step``."""
    relative, absolute = step
    _, exponent = torch.frexp(value.abs().double())  # |x| in [2^(e-1), 2^e)
    return torch.ldexp(torch.full_like(exponent, 1, dtype=torch.float64) * relative, exponent - 1).clamp(min=absolute)


def _within(
    name: str,
    got: torch.Tensor,
    want: Bounded,
    steps: float = 0.0,
    step: tuple[float, float] = (0.0, 0.0),
    weight: torch.Tensor | None = None,
) -> None:
    """``got`` within the bound and ``steps`` spacings of its format (½: to nearest; 1: either neighbour).

    ``weight``: what a remainder counts its units by; it may have been rounded up to a coarser binade.
    """
    error = (got.double() - want.value).abs()
    limit = want.error
    if steps:
        limit = limit + steps * torch.maximum(
            _spacing(got if weight is None else weight, step), _spacing(want.value, step)
        )
    _none(name, (error > limit) | got.isnan(), got, want.value, limit)


def _same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    _none(name, (got != want) & ~(got.isnan() & want.isnan()) if got.is_floating_point() else got != want, got, want)


def _few(name: str, got: torch.Tensor, want: torch.Tensor, bound: Bounded, step: tuple[float, float]) -> None:
    """Two roundings by the same random words differ only where the cut fell between the two values.

    Its probability is their distance in spacings; the number of such elements stays within four standard deviations
    of the largest expectation.
    """
    error = bound.error + HALF_ULP * bound.value.abs()
    expectation = float((error / _spacing(bound.value, step)).clamp(max=1.0).sum())
    count, allowed = int((got != want).sum()), 2 + expectation + 4 * expectation**0.5
    assert count <= allowed, f"{name}: {count} of {got.numel()} elements differ, at most {allowed:.0f} may"


def _none(
    name: str, wrong: torch.Tensor, got: torch.Tensor, want: torch.Tensor, limit: torch.Tensor | None = None
) -> None:
    if not bool(wrong.any()):
        return
    at = int(wrong.flatten().int().argmax())
    values = [float(x.flatten()[at]) for x in (got, want)]
    off = "" if limit is None else f", may be off by {float(limit.flatten()[at]):.3g}"
    counts = f"{int(wrong.sum())} of {wrong.numel()} wrong"
    raise AssertionError(f"{name}: {counts}, first at {at}: {values[0]!r}, expected {values[1]!r}{off}")

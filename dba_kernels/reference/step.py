"""One optimizer step of one parameter: boost, moments, corrected AdamW update (eqs. 3, 7, 8).

Computes in fp64 for fp64 parameters and in fp32 for all others; state and parameter are widened on load and narrowed on
store. The update uses the moments before they are narrowed.
"""

from __future__ import annotations

import torch

from ..stepdata import Coefficient, ParamTensors, TensorBatch
from . import quantize, remainder


def boosted_gradient(
    grad: torch.Tensor, global_grad: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """g_B = γ_t · ĝ_G + (1 − γ_t) · g_D, with a = 1 − γ_t (times the gradient's scale) and b = γ_t  (eq. 3)."""
    return a * grad if global_grad is None else a * grad + b * global_grad


def moments(
    grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m ← β₁ m + (1−β₁) g_B ; v ← β₂ v + (1−β₂) g_B²  (eq. 7)."""
    exp_avg = row[Coefficient.BETA1] * exp_avg + row[Coefficient.ONE_MINUS_BETA1] * grad
    exp_avg_sq = row[Coefficient.BETA2] * exp_avg_sq + row[Coefficient.ONE_MINUS_BETA2] * grad.square()
    return exp_avg, exp_avg_sq


def updated_param(
    param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """θ ← θ·(1 − η_t λ) − η_t · α_t · m̂ / (√v̂ + ε)  (eq. 8).

    Decay and update are added before they touch θ: one rounding instead of two, which matters where both are below
    one ulp of θ.
    """
    denominator = exp_avg_sq.sqrt() * row[Coefficient.INV_SQRT_BIAS_CORRECTION2] + row[Coefficient.EPS]
    return param - (row[Coefficient.LR_WEIGHT_DECAY] * param + row[Coefficient.STEP_SIZE] * exp_avg / denominator)


def load_state(tensor: ParamTensors, state_format: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, v), widened."""
    if state_format != "int8":
        return tensor.exp_avg.to(dtype), tensor.exp_avg_sq.to(dtype)
    shape = tuple(tensor.param.shape)
    return (
        quantize.decode_exp_avg(tensor.exp_avg, tensor.exp_avg_scale, shape),
        quantize.decode_exp_avg_sq(tensor.exp_avg_sq, tensor.exp_avg_sq_scale, shape),
    )


def _random_words(tensor: ParamTensors, step: int) -> torch.Tensor:
    shape, device = tuple(tensor.param.shape), tensor.param.device
    return remainder.random_words(shape, tensor.seed, step, tensor.offset, device)


def _store_state(
    tensor: ParamTensors, state_format: str, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int
) -> None:
    if state_format == "int8":
        stored = (tensor.exp_avg, tensor.exp_avg_scale, tensor.exp_avg_sq, tensor.exp_avg_sq_scale)
        for old, new in zip(stored, quantize.encode_moments(exp_avg, exp_avg_sq), strict=True):
            old.copy_(new)
        return
    if state_format == "bf16":
        # Rounded to nearest, v could never decay: 1 − β₂ is less than half a bf16 ulp.
        exp_avg_sq = remainder.stochastic_bf16(exp_avg_sq.float(), _random_words(tensor, step))
    tensor.exp_avg.copy_(exp_avg)
    tensor.exp_avg_sq.copy_(exp_avg_sq)


def load_param(tensor: ParamTensors, param_format: str, dtype: torch.dtype) -> torch.Tensor:
    """θ, widened, joined with its remainder."""
    if param_format == "native":
        return tensor.param.to(dtype)
    return remainder.join(tensor.param, tensor.remainder, param_format)


def _store_param(tensor: ParamTensors, param_format: str, value: torch.Tensor, step: int) -> None:
    if param_format == "native":
        tensor.param.copy_(value)
        return
    random = _random_words(tensor, step) >> 24 if param_format == "split8" else None
    weight, rest = remainder.split(value, tensor.param.dtype, param_format, random)
    tensor.param.copy_(weight)
    tensor.remainder.copy_(rest)


@torch.no_grad()
def step(batch: TensorBatch, grads: list[torch.Tensor], coefficients: torch.Tensor) -> None:
    """Update every parameter of the batch and its state in place.

    Args:
        batch: parameters, state and stored global gradients.
        grads: domain gradients g_D, floating point, one per parameter.
        coefficients: float64 ``[n_params, Coefficient.COUNT]``.
    """
    for tensor, grad in zip(batch.tensors, grads, strict=True):
        if coefficients[tensor.index, Coefficient.SKIP] != 0:
            continue
        dtype = torch.float64 if tensor.param.dtype == torch.float64 else torch.float32
        row = coefficients[tensor.index].to(dtype)
        global_grad = None if tensor.global_grad is None else quantize.decode(tensor.global_grad).to(dtype)
        boosted = boosted_gradient(  # eq. 3
            grad.to(dtype), global_grad, row[Coefficient.GRAD_WEIGHT], row[Coefficient.GLOBAL_WEIGHT]
        )
        exp_avg, exp_avg_sq = moments(boosted, *load_state(tensor, batch.state_format, dtype), row)  # eq. 7
        param = updated_param(load_param(tensor, batch.param_format, dtype), exp_avg, exp_avg_sq, row)  # eq. 8
        number = int(coefficients[tensor.index, Coefficient.STEP])
        _store_state(tensor, batch.state_format, exp_avg, exp_avg_sq, number)
        _store_param(tensor, batch.param_format, param, number)

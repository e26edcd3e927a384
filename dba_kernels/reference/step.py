"""One optimizer step of one parameter: boost, moments, corrected AdamW update (README eqs. 3, 7, 8).

Computes in fp64 for fp64 parameters and in fp32 for all others; state and parameter are widened on load and narrowed on
store. The update uses the moments before they are narrowed.
"""

from __future__ import annotations

import torch

from ..formats import Coefficient, TensorBatch
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


def _load_state(batch: TensorBatch, i: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    exp_avg, exp_avg_sq = batch.exp_avgs[i], batch.exp_avg_sqs[i]
    if batch.state_format != "int8":
        return exp_avg.to(dtype), exp_avg_sq.to(dtype)
    shape = tuple(batch.params[i].shape)
    return (
        quantize.decode_exp_avg(exp_avg, batch.exp_avg_scales[i], shape),
        quantize.decode_exp_avg_sq(exp_avg_sq, batch.exp_avg_sq_scales[i], shape),
    )


def _random_words(batch: TensorBatch, i: int, step: int) -> torch.Tensor:
    param = batch.params[i]
    return remainder.random_words(tuple(param.shape), batch.seeds[i], step, batch.offsets[i], param.device)


def _store_state(batch: TensorBatch, i: int, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int) -> None:
    if batch.state_format != "int8":
        if batch.state_format == "bf16":
            # Rounded to nearest, v could never decay: 1 − β₂ is less than half a bf16 ulp.
            exp_avg_sq = remainder.stochastic_bf16(exp_avg_sq.float(), _random_words(batch, i, step))
        batch.exp_avgs[i].copy_(exp_avg)
        batch.exp_avg_sqs[i].copy_(exp_avg_sq)
        return
    stored = (batch.exp_avgs[i], batch.exp_avg_scales[i], batch.exp_avg_sqs[i], batch.exp_avg_sq_scales[i])
    for old, new in zip(stored, quantize.encode_moments(exp_avg, exp_avg_sq), strict=True):
        old.copy_(new)


def _load_param(batch: TensorBatch, i: int, dtype: torch.dtype) -> torch.Tensor:
    if batch.param_format == "native":
        return batch.params[i].to(dtype)
    return remainder.join(batch.params[i], batch.remainders[i], batch.param_format)


def _store_param(batch: TensorBatch, i: int, value: torch.Tensor, step: int) -> None:
    param = batch.params[i]
    if batch.param_format == "native":
        param.copy_(value)
        return
    random = _random_words(batch, i, step) >> 24 if batch.param_format == "split8" else None
    weight, rest = remainder.split(value, param.dtype, batch.param_format, random)
    param.copy_(weight)
    batch.remainders[i].copy_(rest)


@torch.no_grad()
def step(batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor) -> None:
    """Update every parameter of the batch and its state in place.

    Args:
        batch: parameters, state and stored global gradients.
        grads: domain gradients g_D, floating point, one per parameter.
        table: coefficient table, float64 ``[n_params, Coefficient.COUNT]``; ``batch.index`` names the rows.
    """
    for i, (index, grad) in enumerate(zip(batch.index.tolist(), grads, strict=True)):
        if table[index, Coefficient.SKIP] != 0:
            continue
        dtype = torch.float64 if batch.params[i].dtype == torch.float64 else torch.float32
        row = table[index].to(dtype)
        global_grad = quantize.decode(batch.global_grads[i]).to(dtype) if batch.global_grads else None
        boosted = boosted_gradient(  # eq. 3
            grad.to(dtype), global_grad, row[Coefficient.GRAD_WEIGHT], row[Coefficient.GLOBAL_WEIGHT]
        )
        exp_avg, exp_avg_sq = moments(boosted, *_load_state(batch, i, dtype), row)  # eq. 7
        param = updated_param(_load_param(batch, i, dtype), exp_avg, exp_avg_sq, row)  # eq. 8
        number = int(table[index, Coefficient.STEP])
        _store_state(batch, i, exp_avg, exp_avg_sq, number)
        _store_param(batch, i, param, number)

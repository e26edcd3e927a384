"""AdamW trajectories of the reference step in every state and parameter format, over the same gradients."""

from __future__ import annotations

import torch

from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS, StoredTensor
from dba_kernels.reference import remainder, step
from dba_kernels.stepdata import Coefficient, ParamTensors, TensorBatch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def gradient(shape: tuple[int, ...], t: int) -> torch.Tensor:
    """bf16 gradient of step t: a drift and noise, of magnitudes that differ a hundredfold between neighbours."""
    fixed = torch.Generator().manual_seed(7)
    size = torch.exp(torch.randn(shape, generator=fixed)) * 1e-3
    drift = torch.randn(shape, generator=fixed)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + t))
    return (size * (0.7 * drift + noise)).bfloat16()


def coefficient_row(t: int, steps: int, lr: float, gamma: float, weight_decay: float) -> torch.Tensor:
    """The table's row of step t of ``steps``, with η_t = lr · (1 − t/steps)."""
    row = torch.zeros(1, Coefficient.COUNT, dtype=torch.float64)
    rate = lr * (1 - t / steps)
    row[0, Coefficient.GRAD_WEIGHT], row[0, Coefficient.GLOBAL_WEIGHT] = 1 - gamma, gamma
    row[0, Coefficient.BETA1], row[0, Coefficient.ONE_MINUS_BETA1] = BETA1, 1 - BETA1
    row[0, Coefficient.BETA2], row[0, Coefficient.ONE_MINUS_BETA2] = BETA2, 1 - BETA2
    row[0, Coefficient.STEP_SIZE] = rate / (1 - BETA1 ** (t + 1))
    row[0, Coefficient.INV_SQRT_BIAS_CORRECTION2] = (1 - BETA2 ** (t + 1)) ** -0.5
    row[0, Coefficient.EPS], row[0, Coefficient.LR_WEIGHT_DECAY] = EPS, rate * weight_decay
    row[0, Coefficient.STEP] = t + 1
    return row


def batch_of(
    start: torch.Tensor, dtype: torch.dtype, param_format: str, state_format: str, seed: int = 1, offset: int = 0
) -> TensorBatch:
    """One parameter with fresh state; ``start`` must be representable in ``dtype``."""
    param, rest = start.to(dtype), None
    if param_format != "native":
        param, rest = remainder.split(start.float(), dtype, param_format)
        assert rest.dtype == PARAM_FORMATS[param_format].remainder
    parts = STATE_FORMATS[state_format].parts(tuple(start.shape), dtype)
    state = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in parts.items()}
    kept = None if rest is None else rest.clone()
    tensor = ParamTensors(0, param.clone(), kept, **state, seed=seed, offset=offset)
    return TensorBatch(param_format, state_format, "none", [tensor])


def value_of(batch: TensorBatch) -> torch.Tensor:
    """float64 of the parameter that the batch stands for."""
    (tensor,) = batch.tensors
    if batch.param_format == "native":
        return tensor.param.double()
    return remainder.join(tensor.param, tensor.remainder, batch.param_format).double()


def displacement(
    start: torch.Tensor,
    dtype: torch.dtype,
    param_format: str = "native",
    state_format: str = "fp32",
    *,
    steps: int,
    lr: float,
    global_grad: StoredTensor | None = None,
    weight_decay: float = 0.0,
) -> torch.Tensor:
    """θ_T − θ_0 in float64 after ``steps`` steps; γ = 0.3 with a global gradient."""
    batch = batch_of(start, dtype, param_format, state_format)
    gamma = 0.0
    if global_grad is not None:
        batch.tensors[0].global_grad, batch.global_format, gamma = global_grad, global_grad.format, 0.3
    for t in range(steps):
        row = coefficient_row(t, steps, lr, gamma, weight_decay)
        step.step(batch, [gradient(tuple(start.shape), t)], row)
    return value_of(batch) - start.double()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return ((got - expected).norm() / expected.norm()).item()

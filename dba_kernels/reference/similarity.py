"""The read-only reduction before an update (inputs of eq. 4), in float64."""

from __future__ import annotations

import torch

from ..stepdata import TensorBatch
from .quantize import decode


def reduce_one(grad: torch.Tensor, global_grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨g_D, ĝ_G⟩ and ‖g_D‖² (float64 scalars); the dot is 0 without a global gradient."""
    wide = grad.double()
    dot = wide.new_zeros(()) if global_grad is None else (wide * global_grad.double()).sum()
    return dot, wide.square().sum()


def similarity(batch: TensorBatch, grads: list[torch.Tensor], sums: torch.Tensor) -> None:
    """Write ⟨g_D, ĝ_G⟩ and ‖g_D‖² of every parameter of the batch to its rows of ``sums`` (float64 ``[n_params, 2]``).

    The gradients are taken as they are: not unscaled, not clipped, not negated. A NaN or an infinity in a gradient
    makes its ‖g_D‖² non-finite.
    """
    for tensor, grad in zip(batch.tensors, grads, strict=True):
        global_grad = None if tensor.global_grad is None else decode(tensor.global_grad)
        sums[tensor.index, 0], sums[tensor.index, 1] = reduce_one(grad, global_grad)

"""One optimizer step: boost, moments, corrected AdamW update (eqs. 3, 7, 8)."""

from __future__ import annotations

import ctypes

import torch

from ..stepdata import NO_OVERRIDES, StepOverrides, StepScalars, StepSettings, TensorBatch
from .coefficients import entered
from .descriptors import structs_of
from .library import address, execution, load


def step(batch: TensorBatch, grads: list[torch.Tensor], coefficients: torch.Tensor) -> None:
    """Boost, moments and corrected AdamW update of every parameter of the batch, in place (eqs. 3, 7, 8).

    One pass. With bf16 gradients and int8 ĝ_G: 27 B/param for fp32 parameters and state, 15 for bf16 split16 with int8
    state, 13 for split8; scales not counted.
    """
    structs, kept = structs_of([batch], [grads], with_state=True)
    load().dba_step(*execution(), structs, len(kept), address("coefficients", coefficients, torch.float64))


def fused_step(
    batches: list[TensorBatch],
    grads: list[list[torch.Tensor]],
    scalars: StepScalars,
    settings: StepSettings,
    overrides: StepOverrides = NO_OVERRIDES,
) -> None:
    """Similarity, coefficients and :func:`step` of a whole model in one call; the same bits.

    The sums of all tensors come first, because one non-finite value anywhere must leave everything untouched: with bf16
    gradients and int8 ĝ_G 3 B/param before the update's 27 (fp32 state).

    Args:
        batches: all active parameters, each in exactly one batch.
        grads: as for :func:`step`, one list per batch.
        scalars, settings, overrides: those of ``coefficients``.
    """
    structs, kept = structs_of(batches, grads, with_state=True)
    arguments, kept_overrides = entered(scalars, settings, overrides)
    load().dba_fused_step(*execution(), structs, len(kept), ctypes.byref(arguments))
    del kept_overrides

"""Stage 1: sums of gradients (eq. 1's sum)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .descriptors import Field, checked_grads, new_descriptors
from .library import address, execution, load


def accumulate(
    totals: list[torch.Tensor],
    grads: list[torch.Tensor],
    weight: float,
    squared_norms: torch.Tensor,
    cache: dict[str, Any] | None = None,
) -> None:
    """``total += weight · grad`` for every pair (eq. 1's sum), ‖grad‖² to ``squared_norms``. 10 B/param for bf16
    gradients of tensors that fit in the cache, 12 beyond."""
    if not totals:
        return
    shapes = [tuple(total.shape) for total in totals]
    descriptors = new_descriptors(shapes)
    descriptors[:, Field.INDEX] = np.arange(len(totals))
    descriptors[:, Field.PARAM] = [
        address(f"totals[{i}]", total, torch.float32, shape)
        for i, (total, shape) in enumerate(zip(totals, shapes, strict=True))
    ]
    kept, codes, addresses = checked_grads(grads, shapes)
    descriptors[:, Field.GRAD_DTYPE], descriptors[:, Field.GRAD] = codes, addresses
    norms = address("squared_norms", squared_norms, torch.float64, (len(totals),))
    load().dba_accumulate(*execution(), descriptors.ctypes.data, len(kept), float(weight), norms)

"""Parameters with their remainders, outside of a step."""

from __future__ import annotations

import torch

from ..formats import PARAM_FORMATS
from .library import DTYPE_CODE, address, execution, load


def displacement(
    param: torch.Tensor, remainder: torch.Tensor | None, origin: torch.Tensor, param_format: str
) -> torch.Tensor:
    """θ − θ₀ of the exact parameter, fp32 in the shape of ``param``."""
    shape, kept = tuple(param.shape), PARAM_FORMATS[param_format].remainder
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    rest = 0 if kept is None or remainder is None else address("remainder", remainder, kept, shape)
    load().dba_displacement(
        *execution(),
        DTYPE_CODE[param.dtype],
        list(PARAM_FORMATS).index(param_format),
        param.numel(),
        address("param", param, param.dtype, shape),
        rest,
        address("origin", origin, param.dtype, shape),
        out.data_ptr(),
    )
    return out

"""What a step takes: parameters, gradients and state whose addresses a backend may read and write.

Checked where a plan lays its batches out; afterwards a backend sees addresses only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed import PLAIN_TYPES, layout_of, local
from .formats import PARAM_FORMATS, STATE_FORMATS
from .stepdata import UPDATED_PARTS

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_storage(name: str, tensor: torch.Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        raise ValueError(
            f"{name}: expected a tensor with storage of its own, got {type(tensor).__name__}, which wraps other "
            "tensors; leave it out of the optimizer, or convert it to a plain tensor first"
        )


def check_state(name: str, param: torch.Tensor, own: Mapping[str, Any], param_format: str, state_format: str) -> None:
    """Every tensor of the state is one whose address a backend may take."""
    parts = STATE_FORMATS[state_format].parts((), param.dtype)
    wanted: dict[str, torch.dtype | None] = {key: dtype for key, (_, dtype) in parts.items()}
    wanted["remainder"] = PARAM_FORMATS[param_format].remainder
    for key in UPDATED_PARTS[1:]:
        if key not in own:
            continue
        part = local(own[key])
        check_storage(f"{key} of {name!r}", part)
        if part.device != param.device or part.dtype != wanted[key] or not part.is_contiguous():
            raise ValueError(
                f"{key} of {name!r}: expected contiguous {wanted[key]} on {param.device}, where its parameter is, got "
                f"{part.dtype}, strides {part.stride()}, on {part.device}; make the optimizer after the model was "
                "moved, or load its state dict again"
            )


def check_grad(param: torch.Tensor, grad: torch.Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"grad of {name!r}: expected a dense tensor, got {grad.layout}; set sparse=False on its layer")
    if grad.dtype not in GRAD_DTYPES and grad.dtype != param.dtype:
        raise ValueError(
            f"grad of {name!r}: expected float32, bfloat16 or float16, got {grad.dtype}; cast it before step()"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"grad of {name!r}: expected its parameter's shape and device, {tuple(param.shape)} on {param.device}, got "
            f"{tuple(grad.shape)} on {grad.device}; somebody replaced grad.data: call zero_grad() and backward() again"
        )
    if not same_place(param, grad):
        raise ValueError(
            f"grad of {name!r}: expected the parameter's layout over the ranks, {layout_of(param)}, got "
            f"{layout_of(grad)}; redistribute it before step()"
        )


def same_place(param: Any, grad: Any) -> bool:
    """Whether a gradient is cut as its parameter; FSDP2's always are."""
    return getattr(param, "placements", None) == getattr(grad, "placements", None)


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [t.data_ptr() if type(t) in PLAIN_TYPES else _address(local(t)) for t in tensors]


def _address(tensor: torch.Tensor) -> int:
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()

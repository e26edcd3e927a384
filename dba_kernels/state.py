"""Optimizer state of one parameter: which formats it gets, how it is allocated, how loaded state is adopted.

Keys are torch's (``step``, ``exp_avg``, ``exp_avg_sq``), and ``exp_avg_scale``, ``exp_avg_sq_scale`` for int8 state,
``remainder`` for a parameter format that keeps one.
"""

from __future__ import annotations

from typing import Any

import torch

from .backends import implementation
from .formats import REMAINDER_DTYPES, is_compressible, matrix_shape, scales_shape


def formats_of(param: torch.Tensor, param_format: str, state_format: str) -> tuple[str, str]:
    """(param_format, state_format) that ``param`` really gets where these two were asked for."""
    if param.dtype == torch.float64 and state_format != "fp32":
        raise ValueError(
            f"state_format: float64 parameters keep uncompressed state, got {state_format!r}; "
            "use state_format='fp32' or cast the model to float32"
        )
    has_remainder = param.dtype in (torch.bfloat16, torch.float16)
    return param_format if has_remainder else "native", state_format if is_compressible(tuple(param.shape)) else "fp32"


def _new_moments(param: torch.Tensor, state_format: str) -> dict[str, torch.Tensor]:
    shape = tuple(param.shape)
    if state_format != "int8":
        narrow = torch.float64 if param.dtype == torch.float64 else torch.float32
        dtype = torch.bfloat16 if state_format == "bf16" else narrow
        return {key: torch.zeros(shape, dtype=dtype, device=param.device) for key in ("exp_avg", "exp_avg_sq")}
    return {
        "exp_avg": torch.zeros(matrix_shape(shape), dtype=torch.int8, device=param.device),
        "exp_avg_sq": torch.zeros(matrix_shape(shape), dtype=torch.uint8, device=param.device),
        "exp_avg_scale": torch.zeros(scales_shape(shape), device=param.device),
        "exp_avg_sq_scale": torch.zeros(scales_shape(shape), device=param.device),
    }


def _new_remainder(param: torch.Tensor, param_format: str) -> torch.Tensor:
    if param_format == "master":
        return param.detach().to(torch.float32, copy=True)
    return torch.zeros(param.shape, dtype=REMAINDER_DTYPES[param_format], device=param.device)


def _convert_moments(state: dict[str, Any], param: torch.Tensor, state_format: str, name: str) -> None:
    """Bring loaded moments into ``state_format``: torch's own state dicts, or one saved with another format."""
    template = _new_moments(param, state_format)
    compressed = state["exp_avg"].dtype == torch.int8 if "exp_avg" in state else False
    expected = _new_moments(param, "int8") if compressed else _new_moments(param, "fp32")
    for key, value in expected.items():
        got = tuple(state[key].shape) if key in state else None
        if got != tuple(value.shape):
            raise ValueError(
                f"{key} of {name!r}: expected shape {tuple(value.shape)}, got {got}; the state belongs to another model"
            )
    if all(key in state and state[key].dtype == value.dtype for key, value in template.items()):
        return
    codec, shape = implementation("reference", "quantize"), tuple(param.shape)
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    if exp_avg.dtype == torch.int8:
        exp_avg = codec.decode_exp_avg(exp_avg, state.pop("exp_avg_scale"), shape)
        exp_avg_sq = codec.decode_exp_avg_sq(exp_avg_sq, state.pop("exp_avg_sq_scale"), shape)
    if state_format == "int8":
        state["exp_avg"], state["exp_avg_scale"] = codec.encode_exp_avg(exp_avg)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = codec.encode_exp_avg_sq(exp_avg_sq)
        return
    for key, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        state[key] = value.to(template[key].dtype).contiguous()


def prepare(state: dict[str, Any], param: torch.Tensor, param_format: str, state_format: str, name: str) -> None:
    """Allocate the state of ``param`` in these formats, or bring what was loaded into them.

    Args:
        state: ``optimizer.state[param]``, updated in place.
        param_format, state_format: what :func:`formats_of` returned.
        name: of the parameter, for errors.

    Raises:
        ValueError: the loaded state has another shape, or a remainder of another ``param_format``.
    """
    if "exp_avg" not in state and "exp_avg_sq" not in state:
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=param.device))
        state.update(_new_moments(param, state_format))
    else:
        _convert_moments(state, param, state_format, name)
    expected = REMAINDER_DTYPES.get(param_format)
    got = state["remainder"].dtype if "remainder" in state else None
    if got is None and expected is not None:
        state["remainder"] = _new_remainder(param, param_format)
    elif got is not None and got == expected and state["remainder"].shape != param.shape:
        raise ValueError(
            f"remainder of {name!r}: expected shape {tuple(param.shape)}, got {tuple(state['remainder'].shape)}; "
            "the state belongs to another model"
        )
    elif got != expected:
        by_dtype: dict[Any, str] = {dtype: format for format, dtype in REMAINDER_DTYPES.items()}
        raise ValueError(
            f"remainder of {name!r}: expected param_format {param_format!r}, the state was saved with "
            f"{by_dtype.get(got, got)!r}; make the optimizer with that param_format"
        )

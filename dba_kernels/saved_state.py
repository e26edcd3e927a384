"""Optimizer state as state dicts hold it: locked where it holds codes, other optimizers' states refused, exports.

Keys are torch's, in ``optimizer.state`` and in state dicts alike: torch.distributed.checkpoint looks for the same ones
in both. Two things that torch's names do not say stand elsewhere: saved groups that belong to int8 moments hold
:data:`LOCK`, and ``remainder_dtypes``, beside ``state`` and ``param_groups``, tells which dtype a remainder completes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .backends import implementation
from .distributed import like, local
from .formats import PARAM_FORMATS, check_type

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
KNOWN = {"step", "anchor", *MOMENTS, "exp_avg_scale", "exp_avg_sq_scale", "remainder"}
OWN_SETTINGS = ("global_gradient", "steps_done", "steps_skipped")
LOCK = {"amsgrad": True, "foreach": True, "differentiable": True}
"""Settings of a saved group with which no optimizer of torch takes codes for numbers: its AdamW and Adam miss
``max_exp_avg_sq`` at their first step, the others cannot differentiate through ``foreach``. None has moved anything
then. :func:`unlocked` takes them away again; nothing here depends on them."""


def to_saved(packed: dict[str, Any], params: list[torch.Tensor]) -> dict[str, Any]:
    """``Optimizer.state_dict()`` with what its names do not say; the tensors are the same."""
    states: dict[Any, dict[str, Any]] = {}
    halves: dict[Any, str] = {}
    for i, state in packed["state"].items():
        states[i] = dict(state)
        for half, dtype in HALVES.items():
            if f"remainder_{half}" in state:  # loaded for another dtype, and not adopted yet
                states[i]["remainder"], halves[i] = states[i].pop(f"remainder_{half}"), half
            elif "remainder" in state and params[i].dtype == dtype:
                halves[i] = half
    groups = packed["param_groups"]
    if any("exp_avg_scale" in state for state in states.values()):
        groups = [{**group, **LOCK} for group in groups]
    saved = {**packed, "state": states, "param_groups": groups}
    return saved | {"remainder_dtypes": halves} if halves else saved


def unlocked(saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` without :data:`LOCK`, where it holds codes; elsewhere ``amsgrad`` means what it says."""
    groups = saved["param_groups"]
    if any(isinstance(state, Mapping) and "exp_avg_scale" in state for state in saved["state"].values()):
        groups = [{**group, "amsgrad": False, "foreach": None, "differentiable": False} for group in groups]
    return {**saved, "param_groups": groups}


def restore_uncast(states: Any, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Put saved state into ``optimizer.state`` as it was saved, where torch has cast it to the parameters' dtypes."""
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    halves = saved.get("remainder_dtypes", {})
    for i, param in zip(saved_ids, params, strict=True):
        if i in saved["state"]:
            state = states[param] = {
                key: value.detach().to(param.device, copy=True) if torch.is_tensor(value) else value
                for key, value in saved["state"][i].items()
            }
            if "remainder" in state and HALVES.get(halves.get(i), param.dtype) != param.dtype:
                state[f"remainder_{halves[i]}"] = state.pop("remainder")  # for adopt_remainder


def check_states(names: list[str], saved: Mapping[str, Any]) -> None:
    """:func:`check_saved` for every parameter of a state dict."""
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    for position, i in enumerate(ids):
        check_saved(repr(names[position] if position < len(names) else i), saved["state"].get(i, {}))


def check_saved(name: str, state: Any) -> None:
    """Refuse the state of another kind of optimizer, before any of it is taken.

    Args:
        name: of the parameter, for errors.

    Raises:
        ValueError: naming what was found.
    """
    what = f"state of {name}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{what}: expected a mapping, got {type(state).__name__}")
    if unknown := [key for key in state if key not in KNOWN]:
        raise ValueError(
            f"{what}: expected exp_avg and exp_avg_sq, as AdamW keeps them, got {unknown[0]!r} too; it was saved by "
            "another kind of optimizer: begin with a fresh state"
        )
    if not state:
        return
    for key in ("step", *MOMENTS):
        if key not in state and (key != "step" or any(m in state for m in MOMENTS)):
            raise ValueError(
                f"{what}: expected {key!r}, got only {sorted(state)}; it is not the whole state of an AdamW"
            )
    step = float(state["step"])
    if not 0 <= step < 2**53 or step != int(step):
        raise ValueError(f"{what}: expected a number of steps, got step = {step:g}")
    compressed = "exp_avg_scale" in state
    for key, codes in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        got, scale = state[key], state.get(f"{key}_scale")
        if not torch.is_tensor(got) or not (got.dtype == codes if compressed else got.dtype.is_floating_point):
            kind = got.dtype if torch.is_tensor(got) else type(got).__name__
            wanted = f"{codes} codes with scales" if compressed else "floating-point numbers"
            raise ValueError(
                f"{what}: expected {wanted} as {key}, got {kind}; it was saved by another kind of optimizer: "
                "begin with a fresh state"
            )
        if compressed and (scale is None or scale.dtype != torch.float32):
            raise ValueError(f"{what}: expected float32 scales beside the codes of {key}, got none")
    least = state["exp_avg_sq_scale"] if compressed else state["exp_avg_sq"]
    if local(least).numel() and bool((local(least) < 0).any()):
        raise ValueError(
            f"{what}: expected second moments >= 0, got negative ones; it was saved by another kind of optimizer: "
            "begin with a fresh state"
        )


# --- remainders -------------------------------------------------------------------------------------------------------


def adopt_remainder(state: dict[str, Any], param: torch.Tensor, param_format: str, name: str) -> None:
    """Bring a loaded remainder to what ``param`` keeps; where the dtype is another, weight and remainder are converted.

    The state of a bf16 model fits its fp32 copy: the fp32 weight then is weight and remainder together. A weight that
    holds more than the saved dtype could is taken as it is: it is exact already.

    Raises:
        ValueError: another shape, another ``param_format`` for the same dtype, or weights beyond the dtype's range.
    """
    found = next((key for key in ("remainder", *(f"remainder_{half}" for half in HALVES)) if key in state), None)
    expected = PARAM_FORMATS[param_format].remainder
    if found is None:
        return
    rest = state.pop(found)
    if tuple(rest.shape) != tuple(param.shape):
        raise ValueError(
            f"remainder of {name!r}: expected shape {tuple(param.shape)}, got {tuple(rest.shape)}; "
            "the state belongs to another model"
        )
    dtype = HALVES[found.removeprefix("remainder_")] if found != "remainder" else _dtype_completed(param)
    formats: dict[Any, str] = {known.remainder: format for format, known in PARAM_FORMATS.items()}
    if expected is not None and rest.dtype != expected:
        raise ValueError(
            f"remainder of {name!r}: expected param_format {param_format!r}, the state was saved with "
            f"{formats.get(rest.dtype, rest.dtype)!r}; make the optimizer with that param_format"
        )
    if dtype == param.dtype:
        if expected is None:
            raise ValueError(
                f"remainder of {name!r}: expected param_format {param_format!r}, the state was saved with "
                f"{formats.get(rest.dtype, rest.dtype)!r}; make the optimizer with that param_format"
            )
        state["remainder"] = rest
        return
    value = _joined(local(param), local(rest), dtype, formats[rest.dtype])
    store_value(state, param, value, param_format, name)


def _dtype_completed(param: torch.Tensor) -> torch.dtype:
    """Which dtype an older state's remainder completes: the parameter's own, or the one that holds its values."""
    if param.dtype in HALVES.values():
        return param.dtype
    part = local(param.detach())
    return next((d for d in HALVES.values() if torch.equal(part.to(d).to(part.dtype), part)), torch.bfloat16)


def _joined(part: torch.Tensor, rest: torch.Tensor, dtype: torch.dtype, param_format: str) -> torch.Tensor:
    """fp32 values of weights that were saved in ``dtype``, and are in another now, with their remainders."""
    wide = part.detach().to(torch.float32)
    weight = wide.to(dtype)
    value: torch.Tensor = implementation("reference", "remainder").join(weight, rest.to(part.device), param_format)
    return torch.where(weight.to(torch.float32) == wide, value, wide)


@torch.no_grad()
def store_value(state: dict[str, Any], param: torch.Tensor, value: torch.Tensor, param_format: str, name: str) -> None:
    """Make ``value``, this rank's part in fp32, the parameter: its weight and, where the format has one, its remainder.

    Raises:
        ValueError: values that the parameter's dtype cannot hold.
    """
    part = local(param)
    if bool((torch.isfinite(value) & ~torch.isfinite(value.to(part.dtype))).any()) or bool(part.isinf().any()):
        raise ValueError(
            f"parameter {name!r}: expected values within the range of {part.dtype}, got larger ones; "
            "keep it in float32 or bfloat16"
        )
    if param_format == "native":
        part.copy_(value)
        return
    weight, rest = implementation("reference", "remainder").split(value, part.dtype, param_format)
    part.copy_(weight)
    state["remainder"] = like(param, rest.contiguous(), tuple(param.shape))


def value_of(state: Mapping[str, Any], param: torch.Tensor, param_format: str) -> torch.Tensor:
    """This rank's part of the exact parameter, fp32 (fp64 for fp64), in memory of its own."""
    part = local(param.detach())
    if part.dtype == torch.float64:
        return part.clone()
    found = {key: value for key, value in state.items() if key.startswith("remainder")}
    for key, rest in found.items():
        formats: dict[Any, str] = {known.remainder: format for format, known in PARAM_FORMATS.items()}
        dtype = HALVES.get(key.removeprefix("remainder_"), _dtype_completed(param))
        return _joined(part, local(rest), dtype, formats[rest.dtype]).clone()
    return part.to(torch.float32, copy=True)


# --- exports ----------------------------------------------------------------------------------------------------------


def for_torch(state_dict: dict[str, Any], params: list[torch.Tensor]) -> dict[str, Any]:
    """A state dict that ``torch.optim.AdamW`` continues from: fp32 moments, nothing else."""
    codec = implementation("reference", "quantize")
    states = {}
    for i, state in state_dict["state"].items():
        param = params[i]
        shape = tuple(local(param).shape)
        moments = {key: local(state[key]) for key in MOMENTS if key in state}
        if "exp_avg_scale" in state:
            moments["exp_avg"] = codec.decode_exp_avg(moments["exp_avg"], local(state["exp_avg_scale"]), shape)
            scale = local(state["exp_avg_sq_scale"])
            moments["exp_avg_sq"] = codec.decode_exp_avg_sq(moments["exp_avg_sq"], scale, shape)
        wide = {key: value if value.dtype == torch.float64 else value.float() for key, value in moments.items()}
        states[i] = {key: like(param, value.clone(), tuple(param.shape)) for key, value in wide.items()}
        if "step" in state:
            states[i]["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()
    groups = [{k: v for k, v in group.items() if k not in OWN_SETTINGS} for group in state_dict["param_groups"]]
    return {"state": states, "param_groups": groups}


def fp32_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``model.state_dict()`` with every parameter of ``optimizer`` as the exact fp32 value that it stands for.

    A weight below fp32 is joined with its remainder or replaced by its fp32 copy, whichever ``param_format`` keeps;
    without one it is widened. Buffers, and parameters that the optimizer does not have, stay as they are.

    Args:
        model: owns the parameters; FSDP2's stay sharded.
        optimizer: a :class:`~dba_kernels.DBAAdamW` over them.

    Raises:
        TypeError: another kind of optimizer.

    Example:
        >>> from dba_kernels import DBAAdamW
        >>> model = nn.Linear(4, 4).bfloat16()
        >>> optimizer = DBAAdamW(model.parameters())
        >>> fp32_state_dict(model, optimizer)["weight"].dtype
        torch.float32
    """
    known = _params_of(optimizer)
    check_type("model", model, nn.Module)
    result: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor):
            result[name] = tensor
        elif id(tensor) in known:
            value = value_of(optimizer.state.get(tensor, {}), tensor, "")
            result[name] = like(tensor, value, tuple(tensor.shape))
        else:
            result[name] = tensor.detach()
    return result


def load_fp32_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Inverse of :func:`fp32_state_dict`: every parameter becomes this fp32 value, weight and remainder together.

    Args:
        model, optimizer: as there; parameters that have no state yet get it.
        state_dict: all of ``model.state_dict()``'s names, values in fp32.

    Raises:
        TypeError: another kind of optimizer.
        ValueError: names or shapes that differ; nothing was loaded then.
    """
    check_type("model", model, nn.Module)
    check_type("state_dict", state_dict, Mapping)
    known, own = _params_of(optimizer), model.state_dict(keep_vars=True)
    for name in own.keys() ^ state_dict.keys():
        raise ValueError(
            f"state_dict: expected the names of model.state_dict(), {name!r} is {'missing' if name in own else 'none'}"
        )
    for name, tensor in own.items():
        if torch.is_tensor(tensor):
            check_type(f"state_dict[{name!r}]", state_dict[name], torch.Tensor)
        if torch.is_tensor(tensor) and tuple(tensor.shape) != tuple(state_dict[name].shape):
            raise ValueError(
                f"state_dict[{name!r}]: expected shape {tuple(tensor.shape)}, got {tuple(state_dict[name].shape)}"
            )
    optimizer.allocate_state()  # type: ignore[attr-defined]
    for name, tensor in own.items():
        if torch.is_tensor(tensor) and id(tensor) in known:
            half = tensor.dtype in HALVES.values()
            param_format = optimizer.options.param_format if half else "native"  # type: ignore[attr-defined]
            value = local(state_dict[name]).to(local(tensor).device, torch.float32)
            store_value(optimizer.state[tensor], tensor, value, param_format, name)
        elif torch.is_tensor(tensor):
            with torch.no_grad():
                tensor.copy_(state_dict[name])


def _params_of(optimizer: Any) -> set[int]:
    if not hasattr(optimizer, "allocate_state"):
        raise TypeError(f"optimizer: expected DBAAdamW, got {type(optimizer).__name__}")
    return {id(param) for group in optimizer.param_groups for param in group["params"]}

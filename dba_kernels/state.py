"""Optimizer state of one parameter: which formats it gets, how it is allocated, how loaded state is adopted.

Keys are torch's (``step``, ``exp_avg``, ``exp_avg_sq``), and ``exp_avg_scale``, ``exp_avg_sq_scale`` for int8 state,
``remainder`` for a parameter format that keeps one, ``anchor`` for θ₀ of a parameter that is held by it. State of a
DTensor parameter is DTensors with its layout, and its formats follow from its global shape, so that any number of ranks
saves and loads the same state.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .backends import implementation
from .base_model import normalize_name
from .distributed import PLAIN_TYPES, Sharding, layout_of, like, local, zeros
from .formats import PARAM_FORMATS, STATE_FORMATS, is_compressible
from .saved_state import adopt_remainder

States = MutableMapping[torch.Tensor, dict[str, Any]]
"""``optimizer.state``."""


@dataclass(frozen=True)
class StateOptions:
    """Formats as they were asked for, "auto" resolved; see :func:`formats_of` for what a parameter gets.

    Args:
        anchored: bare names of the parameters that keep their θ₀.
    """

    param_format: str
    state_format: str
    anchored: frozenset[str] = frozenset()


def formats_of(param: torch.Tensor, options: StateOptions) -> tuple[str, str]:
    """(param_format, state_format) that ``param`` really gets where these options were asked for."""
    param_format, state_format = options.param_format, options.state_format
    if param.dtype == torch.float64 and state_format != "fp32":
        raise ValueError(
            f"state_format: float64 parameters keep uncompressed state, got {state_format!r}; "
            "use state_format='fp32' or cast the model to float32"
        )
    has_remainder = param.dtype in (torch.bfloat16, torch.float16)
    return param_format if has_remainder else "native", state_format if is_compressible(tuple(param.shape)) else "fp32"


@functools.cache
def replayed_bias_correction(beta: float, steps: int) -> float:
    """1 − β^k as the step computes it, c ← βc + (1−β) in float64, so that a resumed run continues bit-exactly."""
    value = 0.0
    for _ in range(steps):
        following = beta * value + (1.0 - beta)
        if following == value:
            break
        value = following
    return value


def _convert_moments(state: dict[str, Any], param: torch.Tensor, state_format: str, name: str) -> None:
    """Bring loaded moments into ``state_format``: torch's own state dicts, or one saved with another format."""
    shape = tuple(param.shape)
    wanted = STATE_FORMATS[state_format].parts(shape, param.dtype)
    compressed = state["exp_avg"].dtype == torch.int8 if "exp_avg" in state else False
    for key, (expected, _) in STATE_FORMATS["int8" if compressed else "fp32"].parts(shape).items():
        got = tuple(state[key].shape) if key in state else None
        if got != expected:
            raise ValueError(
                f"{key} of {name!r}: expected shape {expected}, got {got}; the state belongs to another model"
            )
    if all(key in state and state[key].dtype == dtype for key, (_, dtype) in wanted.items()):
        return
    codec = implementation("reference", "quantize")
    exp_avg, exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
    if compressed:
        shape = tuple(local(param).shape)
        exp_avg = codec.decode_exp_avg(exp_avg, local(state.pop("exp_avg_scale")), shape)
        exp_avg_sq = codec.decode_exp_avg_sq(exp_avg_sq, local(state.pop("exp_avg_sq_scale")), shape)
    parts = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if state_format == "int8":
        keys = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        parts = dict(zip(keys, codec.encode_moments(exp_avg, exp_avg_sq), strict=True))
    for key, part in parts.items():
        whole, dtype = wanted[key]
        state[key] = like(param, part.to(dtype).contiguous(), whole)


def steps_done(state: Mapping[str, Any], name: str) -> int:
    """k of a parameter; 0 without state.

    Raises:
        ValueError: somebody has written something else there.
    """
    step = float(state.get("step", 0))
    if not 0 <= step < 2**53:
        raise ValueError(f"step of {name!r}: expected a number of steps, got {step:g}; load the state again")
    return int(step)


def prepare(state: dict[str, Any], param: torch.Tensor, param_format: str, state_format: str, name: str) -> None:
    """Allocate the state of ``param`` in these formats, or bring what was loaded into them.

    Args:
        state: ``optimizer.state[param]``, updated in place.
        param_format, state_format: what :func:`formats_of` returned.
        name: of the parameter, for errors.

    Raises:
        ValueError: the loaded state has another shape or layout over ranks, or a remainder of another
            ``param_format``.
    """
    for key, value in list(state.items()):
        if torch.is_tensor(value) and key != "step" and layout_of(value) != layout_of(param):
            raise ValueError(
                f"{key} of {name!r}: expected the parameter's layout over the ranks, {layout_of(param)}, got "
                f"{layout_of(value)}; load with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, "
                "which cuts state like its parameter"
            )
    if "exp_avg" not in state and "exp_avg_sq" not in state:
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=param.device))
        parts = STATE_FORMATS[state_format].parts(tuple(param.shape), param.dtype)
        state.update({key: zeros(param, *kind) for key, kind in parts.items()})
    else:
        _convert_moments(state, param, state_format, name)
    adopt_remainder(state, param, param_format, name)
    kept = PARAM_FORMATS[param_format].remainder
    if kept is not None and "remainder" not in state:
        master = param_format == "master"
        state["remainder"] = param.detach().to(kept, copy=True) if master else zeros(param, tuple(param.shape), kept)


def prepare_origin(state: dict[str, Any], param: torch.Tensor, name: str) -> None:
    """Keep θ₀, the parameter's value before its first step.

    Raises:
        ValueError: the loaded state is that of a run that has begun without.
    """
    if "anchor" in state:
        if state["anchor"].shape != param.shape or state["anchor"].dtype != param.dtype:
            got = f"{state['anchor'].dtype} {tuple(state['anchor'].shape)}"
            raise ValueError(
                f"anchor of {name!r}: expected {param.dtype} {tuple(param.shape)}, got {got}; the state belongs to "
                "another model"
            )
        return
    if int(state["step"]) > 0:
        raise ValueError(
            f"anchor of {name!r}: expected the weights before the first step in the state, got none after "
            f"{int(state['step'])} steps; resume with anchor=0, or start the run with the anchor"
        )
    state["anchor"] = param.detach().clone()


def allocate(named: Iterable[tuple[str, torch.Tensor]], states: States, options: StateOptions) -> None:
    """State of these parameters, as the first step would make it."""
    for name, param in named:
        prepare(states[param], param, *formats_of(param, options), name)
        if normalize_name(name) in options.anchored:
            prepare_origin(states[param], param, name)


def same_tensors(known: dict[str, torch.Tensor], now: dict[str, torch.Tensor] | None) -> bool:
    """Whether a parameter's entry of the state still holds these, and not others in their place."""
    return now is not None and all(now.get(key) is tensor for key, tensor in known.items())


@dataclass
class Witness:
    """Plain tensors that were seen, in flat lists which are compared without a line of Python per tensor.

    The check of every step is most of the host's work where tensors are small. It may report a change where there is
    none (a key was added, parameters have state but no gradient), never the reverse: then the slow check decides.

    Args:
        own: the parameters' entries of ``optimizer.state``, in the parameters' order.
        values: of all these entries, one after the other.
        tensors: the parameters, then every tensor among the values.
        addresses: theirs.
    """

    own: list[dict[str, Any]]
    values: list[Any]
    tensors: list[torch.Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, params: list[torch.Tensor], states: Mapping[Any, Any]) -> Witness | None:
        """None where a tensor is not a plain one."""
        own = [states[p] for p in params]
        values = list(itertools.chain.from_iterable(map(dict.values, own)))
        tensors = params + [value for value in values if torch.is_tensor(value)]
        if any(type(t) not in PLAIN_TYPES for t in tensors):
            return None
        return cls(own, values, tensors, list(map(torch.Tensor.data_ptr, tensors)))

    def sees_no_change(self, params: list[torch.Tensor], states: Mapping[Any, Any]) -> bool:
        now = list(itertools.chain.from_iterable(map(dict.values, self.own)))
        return (
            len(states) == len(params)
            and all(map(operator.is_, states, params))
            and all(map(operator.is_, states.values(), self.own))
            and len(now) == len(self.values)
            and all(map(operator.is_, now, self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


def only_allocates(
    groups: list[dict[str, Any]], named: Iterable[tuple[str, torch.Tensor]], grads: list[torch.Tensor]
) -> bool:
    """Checkpoint libraries call ``step()`` on empty state with lr 0 and zero gradients to have state allocated."""
    if any(float(group["lr"]) != 0.0 for group in groups):
        return False
    zero = all(not torch.any(local(grad)) for grad in grads)
    sharding = Sharding(named)
    if sharding.communicates:  # zeros in the rows here do not make a gradient zero: all ranks decide alike
        zero = not sharding.sum_(torch.tensor(float(not zero), device=sharding.mesh.device_type))
    return zero

"""The coefficients of a step, from the sums of its reduction (eqs. 2, 4, 5)."""

from __future__ import annotations

import ctypes
import math
import weakref

import torch

from ..stepdata import (
    CORRECTIONS,
    NO_OVERRIDES,
    Coefficient,
    Hyper,
    StepOverrides,
    StepScalars,
    StepSettings,
    Summary,
)
from .library import address, load


class CoefficientArguments(ctypes.Structure):
    """``CoefficientArguments`` in csrc/coefficients.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "global_sq", "hyper", "group", "active")),
        ("active_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("steps", "bias_corrections", "counters", "table", "report", "summary")),
        *((name, ctypes.c_double) for name in ("boost", "total_steps", "boost_max", "alpha_min", "alpha_max")),
        ("max_grad_norm", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("correction", "global_scope", "reduce")),
        ("loss_scale", ctypes.c_double),
        ("found_inf", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gamma_override", "alpha_override")),
    ]


_known: dict[int, tuple[weakref.ref[StepScalars], CoefficientArguments]] = {}
"""By the scalars' id; an entry goes when they go."""


def _of_scalars(scalars: StepScalars) -> CoefficientArguments:
    """The struct of these scalars, checked once; the rest of it changes from call to call."""
    key = id(scalars)
    if (known := _known.get(key)) is not None:
        return known[1]
    n, wide, index = len(scalars.steps), torch.float64, torch.int64
    arguments = CoefficientArguments(
        sums=address("sums", scalars.sums, wide, (n, 2)),
        global_sq=address("global_sq", scalars.global_sq, wide, (n,)),
        hyper=address("hyper", scalars.hyper, wide, (len(scalars.hyper), Hyper.COUNT)),
        group=address("group", scalars.group, index, (n,)),
        active=address("active", scalars.active, index, (len(scalars.active),)),
        active_count=len(scalars.active),
        steps=address("steps", scalars.steps, torch.float32),
        bias_corrections=address("bias_corrections", scalars.bias_corrections, wide, (n, 2)),
        counters=address("counters", scalars.counters, index, (2,)),
        table=address("coefficients", scalars.coefficients, wide, (n, Coefficient.COUNT)),
        report=address("report", scalars.report, wide, (n, 2)),
        summary=address("summary", scalars.summary, wide, (Summary.COUNT,)),
    )
    _known[key] = weakref.ref(scalars, lambda _: _known.pop(key)), arguments
    return arguments


def entered(
    scalars: StepScalars, settings: StepSettings, overrides: StepOverrides
) -> tuple[CoefficientArguments, list[torch.Tensor | None]]:
    """The struct to pass, and what must stay alive until the call is over."""
    loss_scale, found_inf = overrides.loss_scale, overrides.found_inf
    gamma = None if overrides.gamma is None else overrides.gamma.to(torch.float64).reshape(())
    alpha = None if overrides.alpha is None else overrides.alpha.to(torch.float64).contiguous()
    arguments = _of_scalars(scalars)
    arguments.boost, arguments.total_steps, arguments.boost_max = (
        settings.boost,
        settings.total_steps,
        settings.boost_max,
    )
    arguments.alpha_min, arguments.alpha_max = settings.bounds
    arguments.max_grad_norm = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    arguments.correction = CORRECTIONS.index(settings.correction)
    arguments.global_scope, arguments.reduce = settings.scope == "global", settings.reduce
    arguments.loss_scale = 1.0 if loss_scale is None else loss_scale.item()
    arguments.found_inf = found_inf is not None and bool((found_inf != 0).any())
    arguments.gamma_override = None if gamma is None else gamma.data_ptr()
    arguments.alpha_override = None if alpha is None else address("alpha", alpha, torch.float64, (len(scalars.steps),))
    return arguments, [gamma, alpha]


def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides = NO_OVERRIDES) -> None:
    """Sums → coefficients, skip flag and counters (eqs. 2, 4, 5); see ``reference.coefficients``."""
    arguments, _kept = entered(scalars, settings, overrides)
    load().dba_coefficients(ctypes.byref(arguments))

"""The coefficients of a step, from the sums of its reduction (eqs. 2, 4, 5)."""

from __future__ import annotations

import ctypes
import math

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


def entered(
    scalars: StepScalars, settings: StepSettings, overrides: StepOverrides
) -> tuple[CoefficientArguments, list[torch.Tensor | None]]:
    """The struct to pass, and what must stay alive until the call is over."""
    n, wide, index = len(scalars.steps), torch.float64, torch.int64
    loss_scale, found_inf = overrides.loss_scale, overrides.found_inf
    gamma = None if overrides.gamma is None else overrides.gamma.to(wide).reshape(())
    alpha = None if overrides.alpha is None else overrides.alpha.to(wide).contiguous()
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
        boost=settings.boost,
        total_steps=settings.total_steps,
        boost_max=settings.boost_max,
        alpha_min=settings.bounds[0],
        alpha_max=settings.bounds[1],
        max_grad_norm=math.inf if settings.max_grad_norm is None else settings.max_grad_norm,
        correction=CORRECTIONS.index(settings.correction),
        global_scope=settings.scope == "global",
        reduce=settings.reduce,
        loss_scale=1.0 if loss_scale is None else loss_scale.item(),
        found_inf=found_inf is not None and bool((found_inf != 0).any()),
        gamma_override=None if gamma is None else gamma.data_ptr(),
        alpha_override=None if alpha is None else address("alpha", alpha, wide, (n,)),
    )
    return arguments, [gamma, alpha]


def coefficients(scalars: StepScalars, settings: StepSettings, overrides: StepOverrides = NO_OVERRIDES) -> None:
    """Sums → coefficients, skip flag and counters (eqs. 2, 4, 5); see ``reference.coefficients``."""
    arguments, _kept = entered(scalars, settings, overrides)
    load().dba_coefficients(ctypes.byref(arguments))

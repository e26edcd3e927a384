"""The reference, broken on purpose, one equation at a time: what a test of the equations must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dba_kernels.reference import coefficients
from dba_kernels.reference import step as step_module
from dba_kernels.stepdata import Coefficient, StepOverrides, StepScalars, StepSettings, Summary

from .oracle import BUSY, Case

Arguments = dict[str, Any]
_coefficients = coefficients.coefficients
Breaks = Callable[[pytest.MonkeyPatch], None]


def patched(function: str, wrong: Callable[..., Any], module: Any = coefficients) -> Breaks:
    return lambda patch: patch.setattr(module, function, wrong)


def edited(edit: Callable[[Arguments, torch.Tensor], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Coefficients changed after they were computed: ``edit(arguments, rows of the active parameters)``."""

    def wrong(tables: StepScalars, settings: StepSettings, overrides: StepOverrides) -> None:
        _coefficients(tables, settings, overrides)
        arguments = vars(tables) | {"settings": settings} | vars(overrides)
        rows = arguments["coefficients"][arguments["active"]]
        edit(arguments, rows)
        arguments["coefficients"][arguments["active"]] = rows

    return patched("coefficients", wrong)


def given(**change: Callable[[Arguments], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Coefficients computed from wrong arguments."""

    def wrong(tables: StepScalars, settings: StepSettings, overrides: StepOverrides) -> None:
        arguments = vars(tables) | {"settings": settings} | vars(overrides)
        arguments |= {name: f(arguments) for name, f in change.items()}
        settings = arguments.pop("settings")
        _coefficients(
            StepScalars(**{name: arguments[name] for name in vars(tables)}),
            settings,
            StepOverrides(**{name: arguments[name] for name in vars(overrides)}),
        )

    return patched("coefficients", wrong)


def _grad_sq(arguments: Arguments) -> torch.Tensor:
    return arguments["sums"][arguments["active"], 1] / arguments["loss_scale"].double() ** 2


def _reclip(rows: torch.Tensor, arguments: Arguments, norm: torch.Tensor) -> None:
    """Clip the domain gradient by ``norm`` instead."""
    factor = (arguments["settings"].max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    rows[:, Coefficient.GRAD_WEIGHT] *= factor / arguments["summary"][Summary.CLIP_FACTOR]


def boost_before_clip(arguments: Arguments, rows: torch.Tensor) -> None:
    a = rows[:, Coefficient.GRAD_WEIGHT] / arguments["summary"][Summary.CLIP_FACTOR]
    b = rows[:, Coefficient.GLOBAL_WEIGHT]
    dot, grad_sq = arguments["sums"][arguments["active"]].T
    stored_sq = arguments["global_sq"][arguments["active"]].clamp(min=0)
    norm = (a**2 * grad_sq + 2 * a * b * dot + b**2 * stored_sq).sum().sqrt()
    factor = (arguments["settings"].max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    rows[:, Coefficient.GRAD_WEIGHT], rows[:, Coefficient.GLOBAL_WEIGHT] = a * factor, b * factor


def clip_before_unscale(arguments: Arguments, rows: torch.Tensor) -> None:
    _reclip(rows, arguments, _grad_sq(arguments).sum().sqrt() * arguments["loss_scale"])


def clip_each_tensor(arguments: Arguments, rows: torch.Tensor) -> None:
    _reclip(rows, arguments, _grad_sq(arguments).sqrt())


def clip_without_plain(arguments: Arguments, rows: torch.Tensor) -> None:
    has_global = arguments["global_sq"][arguments["active"]] >= 0
    _reclip(rows, arguments, _grad_sq(arguments)[has_global].sum().sqrt())


def alpha_before_moments(arguments: Arguments, rows: torch.Tensor) -> None:
    alpha = arguments["report"][arguments["active"], 1]
    rows[:, [Coefficient.GRAD_WEIGHT, Coefficient.GLOBAL_WEIGHT]] *= alpha.unsqueeze(1)
    rows[:, Coefficient.STEP_SIZE] /= alpha


def alpha_on_decay(arguments: Arguments, rows: torch.Tensor) -> None:
    rows[:, Coefficient.LR_WEIGHT_DECAY] *= arguments["report"][arguments["active"], 1]


def no_first_bias_correction(arguments: Arguments, rows: torch.Tensor) -> None:
    rows[:, Coefficient.STEP_SIZE] *= arguments["bias_corrections"][arguments["active"], 0]


def no_second_bias_correction(arguments: Arguments, rows: torch.Tensor) -> None:
    rows[:, Coefficient.INV_SQRT_BIAS_CORRECTION2] = 1.0


def bias_correction_by_optimizer_steps(arguments: Arguments, rows: torch.Tensor) -> None:
    own = arguments["bias_corrections"][arguments["active"], 0]
    rows[:, Coefficient.STEP_SIZE] *= own / (1 - rows[:, Coefficient.BETA1] ** arguments["counters"][0])


def projection_of_unclipped(arguments: Arguments, rows: torch.Tensor) -> None:
    rows[:, Coefficient.GLOBAL_WEIGHT] /= arguments["summary"][Summary.CLIP_FACTOR]


def skip_only_the_bad_tensor(arguments: Arguments, rows: torch.Tensor) -> None:
    finite = torch.isfinite(arguments["sums"][arguments["active"], 1])
    rows[finite] = torch.where(rows[finite].isfinite(), rows[finite], 0.0)
    rows[finite, Coefficient.SKIP] = 0.0


def eps_inside_root(param: torch.Tensor, m: torch.Tensor, v: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    root = (v * row[Coefficient.INV_SQRT_BIAS_CORRECTION2] ** 2 + row[Coefficient.EPS]).sqrt()
    return param * (1 - row[Coefficient.LR_WEIGHT_DECAY]) - row[Coefficient.STEP_SIZE] * m / root


def decay_after_update(param: torch.Tensor, m: torch.Tensor, v: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    denominator = v.sqrt() * row[Coefficient.INV_SQRT_BIAS_CORRECTION2] + row[Coefficient.EPS]
    return (param - row[Coefficient.STEP_SIZE] * m / denominator) * (1 - row[Coefficient.LR_WEIGHT_DECAY])


def squares_of_deviation(
    g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    new = row[Coefficient.BETA1] * m + row[Coefficient.ONE_MINUS_BETA1] * g
    return new, row[Coefficient.BETA2] * v + row[Coefficient.ONE_MINUS_BETA2] * (g - new) ** 2


_gamma, _cosine = coefficients.gamma, coefficients.cosine
AGEM, PCGRAD = replace(BUSY, correction="agem"), replace(BUSY, correction="pcgrad")
CONTROLS: dict[str, tuple[Case, Callable[[pytest.MonkeyPatch], None]]] = {
    "eq. 2: γ counts from 1": (BUSY, patched("gamma", lambda step, s: _gamma(step + 1, s))),
    "eq. 2: γ without clamp": (BUSY, patched("gamma", lambda step, s: _gamma(step, replace(s, boost_max=9.0)))),
    "eq. 2: γ counts skipped steps": (
        BUSY,
        given(gamma=lambda x: _gamma(x["counters"].sum(), x["settings"])),
    ),
    "eq. 2: γ constant": (BUSY, patched("gamma", lambda step, s: _gamma(torch.zeros_like(step), s))),
    "eq. 3: weights swapped": (
        BUSY,
        patched("boosted_gradient", lambda g, h, a, b: a * g if h is None else b * g + a * h, step_module),
    ),
    "eq. 3: no boost": (BUSY, patched("boosted_gradient", lambda g, h, a, b: a * g, step_module)),
    "eq. 3: ĝ_G added": (BUSY, edited(lambda x, rows: rows[:, Coefficient.GRAD_WEIGHT].div_(1 - x["summary"][0]))),
    "eq. 4: φ not normalised": (BUSY, patched("cosine", lambda dot, g, h: dot.clamp(-1, 1))),
    "eq. 4: φ normalised by one norm": (BUSY, patched("cosine", lambda dot, g, h: (dot / h).nan_to_num().clamp(-1, 1))),
    "eq. 4: φ an angle": (BUSY, patched("cosine", lambda dot, g, h: _cosine(dot, g, h).acos() / math.pi)),
    "eq. 4: φ without sign": (BUSY, patched("cosine", lambda dot, g, h: _cosine(dot, g, h).abs())),
    "eq. 4: φ of the wrong scope": (BUSY, given(settings=lambda x: replace(x["settings"], scope="global"))),
    "eq. 5: α = 1 + φ": (BUSY, patched("correction", lambda phi, bounds: (1 + phi).clamp(*bounds))),
    "eq. 5: α without clamp": (
        replace(BUSY, bounds=(0.95, 1.05)),
        patched("correction", lambda phi, bounds: 1 - phi),
    ),
    "eq. 5: α = 1": (BUSY, patched("correction", lambda phi, bounds: torch.ones_like(phi))),
    "eq. 5: α scales the gradient": (BUSY, edited(alpha_before_moments)),
    "eq. 7: v of the deviation": (BUSY, patched("moments", squares_of_deviation, step_module)),
    "eq. 8: α scales the decay": (BUSY, edited(alpha_on_decay)),
    "eq. 8: ε inside the root": (BUSY, patched("updated_param", eps_inside_root, step_module)),
    "eq. 8: decay after the update": (BUSY, patched("updated_param", decay_after_update, step_module)),
    "bias correction: none of m": (BUSY, edited(no_first_bias_correction)),
    "bias correction: none of v": (BUSY, edited(no_second_bias_correction)),
    "bias correction: by optimizer steps": (BUSY, edited(bias_correction_by_optimizer_steps)),
    "order: boost before clip": (BUSY, edited(boost_before_clip)),
    "order: clip before unscale": (BUSY, edited(clip_before_unscale)),
    "clip: not at all": (BUSY, patched("clip_factor", lambda norm, limit: torch.ones_like(norm))),
    "clip: without the 1e-6": (BUSY, patched("clip_factor", lambda norm, limit: (limit / norm).clamp(max=1.0))),
    "clip: tensor by tensor": (BUSY, edited(clip_each_tensor)),
    "clip: only what has ĝ_G": (BUSY, edited(clip_without_plain)),
    "loss scale ignored": (BUSY, given(loss_scale=lambda x: None)),
    "maximize ignored": (replace(BUSY, maximize=True), given(hyper=lambda x: x["hyper"].abs())),
    "without ĝ_G: taken for ĝ_G = 0": (BUSY, given(global_sq=lambda x: x["global_sq"].clamp(min=0))),
    "skip: only the bad tensor": (BUSY, edited(skip_only_the_bad_tensor)),
    "skip: found_inf ignored": (BUSY, given(found_inf=lambda x: None)),
    "A-GEM: projects without conflict": (
        AGEM,
        patched("projection_weights", lambda mode, dot, g, h: (torch.ones_like(dot), (-dot / h).nan_to_num())),
    ),
    "A-GEM: of the unclipped gradient": (AGEM, edited(projection_of_unclipped)),
    "A-GEM: in place of PCGrad": (PCGRAD, given(settings=lambda x: replace(x["settings"], correction="agem"))),
}

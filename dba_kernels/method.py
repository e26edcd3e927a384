"""What DBA decides outside the kernels: T, k₀ and its rule, the correction, warnings, what a state dict keeps."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch

from .distributed import answers_of_ranks, world_size
from .formats import check_integer, check_name, check_number, check_path, check_type
from .global_gradient import GlobalGradient
from .schedule import ANCHORS, AUTO_BOOST_REACH, BOOSTS, initial_anchor, initial_boost
from .stepdata import CORRECTION_SCOPES, CORRECTIONS, PROJECTIONS, StepSettings

LARGE_LR = 1e-4
"""Above it DBA warns: even the small boosts of ``boost="auto"`` did harm there (``python -m bench.quality``)."""

SAVED_SETTINGS = (
    *("boost", "total_steps", "boost_max", "correction", "scope", "bounds", "max_grad_norm"),
    *("anchor", "anchor_every"),
)
"""Settings that a resumed run should share with the one that was saved."""

PATIENCE = 10.0
"""Seconds that a rank waits, once, for the others to say which global gradient they use."""

_questions = itertools.count()

BoostSchedule = Callable[[torch.Tensor, int], Any]
Correction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Method:
    """How a stored global gradient is used. Without one it is plain AdamW, with clipping at most.

    Args:
        global_gradient, total_steps, boost, boost_max, correction, scope, bounds, max_grad_norm, anchor, anchor_every:
            arguments of ``DBAAdamW``.

    Attributes:
        settings: what the kernels are told; a function in place of a name leaves the neutral value there.
        schedule, correction: the functions that were given, or None.
        rule: the name of k₀ that was given, or None.
        names_anchor: whether λ was given by name.
        anchored: bare names of the parameters that the anchor holds.
        initial_lr: the largest group's learning rate at the start.

    Raises:
        ValueError: on an argument outside its range.
    """

    def __init__(
        self,
        global_gradient: GlobalGradient | str | os.PathLike[str] | None,
        total_steps: int | str | None,
        boost: str | float | BoostSchedule,
        boost_max: float,
        correction: str | Correction,
        scope: str,
        bounds: tuple[float, float],
        max_grad_norm: float | None,
        anchor: str | float = 0.0,
        anchor_every: int = 1,
    ):
        if max_grad_norm is not None and not check_number("max_grad_norm", max_grad_norm, "a positive number") > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if isinstance(global_gradient, (str, os.PathLike)):
            check_path("global_gradient", global_gradient)
            global_gradient = GlobalGradient.load(global_gradient)
        if global_gradient is not None:
            check_type("global_gradient", global_gradient, GlobalGradient)
        self.global_gradient = global_gradient
        self.schedule: BoostSchedule | None = boost if _is_function(boost) else None
        self.correction: Correction | None = correction if callable(correction) else None
        self.rule: str | None = boost if isinstance(boost, str) else None
        self.initial_lr = 0.0
        self._compared = False
        settings = _checked(total_steps, boost, boost_max, correction, scope, bounds)
        strength = _checked_anchor(anchor, global_gradient)
        self.names_anchor = isinstance(anchor, str)
        self.anchored: frozenset[str] = frozenset()
        if global_gradient is not None and strength > 0:
            self.anchored = frozenset(global_gradient.curvature_records)
        if global_gradient is None:
            if total_steps is not None:
                warnings.warn("total_steps: given without a global_gradient; this is plain AdamW", stacklevel=3)
            settings = StepSettings()
        elif len(global_gradient) == 0:  # curvature alone
            settings = StepSettings()
        elif settings.total_steps == 0 and settings.correction not in PROJECTIONS and total_steps != "later":
            raise ValueError(
                "total_steps: expected the number of optimizer steps of the run, not of micro-batches, over which the "
                f"boost decays to 0; got {total_steps}"
            )
        reduce = global_gradient is not None or max_grad_norm is not None
        settings = replace(settings, anchor=strength, anchor_every=check_integer("anchor_every", anchor_every, 1))
        self.settings = replace(settings, max_grad_norm=max_grad_norm, reduce=reduce)

    @property
    def calibration(self) -> float:
        """κ of the file; 1 where nobody measured it."""
        gg = self.global_gradient
        return 1.0 if gg is None or gg.calibration is None else gg.calibration

    # --- the length of the run ----------------------------------------------------------------------------------------

    @property
    def needs_total_steps(self) -> bool:
        """Whether anything depends on T: there is a global gradient, and a schedule weighs it."""
        return bool(self.global_gradient) and self.settings.correction not in PROJECTIONS

    @property
    def awaits_total_steps(self) -> bool:
        """Whether ``total_steps="later"`` still waits for :meth:`set_total_steps`."""
        return self.needs_total_steps and self.settings.total_steps == 0

    def begin(self, lr: float) -> None:
        """Take η₀, from which a named boost and a named λ follow, and warn of what the study found harmful."""
        if self.global_gradient is None:
            return
        self.initial_lr = lr
        if self.names_anchor and self.anchored:
            self.settings = replace(self.settings, anchor=initial_anchor(lr, self.global_gradient.calibration))
        if self.settings.total_steps:
            self._settle(self.settings.total_steps)
        if not self.awaits_total_steps:
            self._warn_about_boost()
            self._warn_about_lr()

    def set_total_steps(self, total_steps: int) -> None:
        """``DBAAdamW.set_total_steps``."""
        steps, known = _checked_total_steps(total_steps), self.settings.total_steps
        if not self.needs_total_steps or steps == known:
            return
        if known:
            warnings.warn(f"total_steps: changed from {known} to {steps}; gamma follows the new one", stacklevel=3)
        self._settle(steps)
        self._warn_about_boost()
        if not known:
            self._warn_about_lr()

    def _settle(self, steps: int, boost: float | None = None) -> None:
        """Set T, and k₀ where it is given or a name stands for it."""
        if boost is None:
            named = self.rule if self.global_gradient else None
            if named == "auto" and self.anchored:
                boost = 0.0  # with an anchor the boost has not been measured
            else:
                boost = initial_boost(named, steps, self.initial_lr) if named else self.settings.boost
        self.settings = replace(self.settings, total_steps=steps, boost=boost)

    def _warn_about_boost(self) -> None:
        k0, limit, lr = self.settings.boost, self.settings.boost_max, self.initial_lr
        if self.rule == "auto":
            return
        if k0 > limit:
            warnings.warn(
                f"boost: gamma starts at k0 = {k0:.3g} and is clamped to boost_max = {limit:g} until it has decayed "
                "below; the total boost is smaller than the method's, as it is in every run of few steps",
                stacklevel=4,
            )
        k0, steps = min(k0, limit), self.settings.total_steps
        if k0 * steps * lr > AUTO_BOOST_REACH:
            warnings.warn(
                f"boost: {k0:.3g} is large for lr = {lr:g} and {steps} steps: the stored global gradient holds near "
                f'the base model only; boost="auto" would begin at {initial_boost("auto", steps, lr):.3g}',
                stacklevel=4,
            )

    def _warn_about_lr(self) -> None:
        if self.initial_lr > LARGE_LR and self.global_gradient:
            warnings.warn(
                f"lr: {self.initial_lr:g} is large for a method that anneals: the stored global gradient holds near "
                f"the base model only, and above {LARGE_LR:g} following it did harm in our study",
                stacklevel=4,
            )

    # --- a user's functions -------------------------------------------------------------------------------------------

    def scheduled_boost(self, counters: torch.Tensor) -> torch.Tensor | None:
        """γ_t as the user's function gives it, clamped; None without one.

        Args:
            counters: int64 ``[2]``, the first of them t.
        """
        if self.schedule is None:
            return None
        done = counters.select(0, 0)
        value = _on_device(self.schedule(done, self.settings.total_steps), done.device)
        return torch.where(done < self.settings.total_steps, value, 0.0).clamp(0.0, self.settings.boost_max)

    def corrections(self, dot: torch.Tensor, grad_sq: torch.Tensor, global_sq: torch.Tensor) -> torch.Tensor:
        """α_t of every parameter as the user's function gives it, clamped, and 1 where it is NaN.

        Args:
            dot, grad_sq, global_sq: float64 ``[n]`` of the unscaled gradients; 0 for parameters that take no part.
        """
        assert self.correction is not None
        if self.settings.scope == "global":
            dot, grad_sq, global_sq = (x.sum().expand_as(x) for x in (dot, grad_sq, global_sq))
        alpha = _on_device(self.correction(dot, grad_sq, global_sq), dot.device)
        return alpha.nan_to_num(nan=1.0).expand_as(dot).clamp(*self.settings.bounds)

    # --- what a state dict keeps --------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any] | None:
        """Of the global gradient and its use: never its data; None without one."""
        gg = self.global_gradient
        if gg is None:
            return None
        settings = {name: getattr(self.settings, name) for name in SAVED_SETTINGS}
        settings["bounds"] = list(self.settings.bounds)
        return {"path": None if gg.path is None else str(gg.path), "digest": gg.digest, "settings": settings}

    def check_saved(self, saved: dict[str, Any] | None) -> None:
        """Refuse the identity of another global gradient; warn of other settings.

        Raises:
            ValueError: the state was saved with another global gradient.
        """
        if not saved:
            return
        mine = self.identity()
        if mine is None or mine["digest"] != saved["digest"]:
            got = "none" if mine is None else f"{mine['digest']} ({mine['path']})"
            raise ValueError(
                f"global_gradient: the state was saved with digest {saved['digest']} ({saved['path']}), this optimizer "
                f"has {got}; resume with the same file"
            )
        # What this optimizer does not know yet it takes over from the saved one.
        open_ones = {"total_steps", "boost" if self.rule else ""} if self.awaits_total_steps else set()
        known = {k: v for k, v in saved["settings"].items() if k not in open_ones}
        changed = {k: (v, mine["settings"][k]) for k, v in known.items() if mine["settings"][k] != v}
        if changed:
            warnings.warn(f"resuming with other settings than were saved (saved, now): {changed}", stacklevel=6)

    def check_ranks(self, names: list[str]) -> None:
        """Compare with the other ranks, once: replicas with another global gradient would silently drift apart.

        Only ranks that train the same parameters are compared, and paths are not: nodes may have copies of one file.

        Args:
            names: of the parameters.

        Raises:
            ValueError: another global gradient or other settings of it on some rank; all ranks that have one say so.
        """
        if self._compared or world_size() == 1:
            return
        mine = self.identity() or {"digest": None, "settings": {}, "path": None}
        whose = hashlib.sha256("\n".join(names).encode()).hexdigest()
        patience = 0.0 if self.global_gradient is None else PATIENCE
        answers = answers_of_ranks(f"global_gradient/{next(_questions)}", json.dumps([whose, mine]), patience)
        others = {rank: other for rank, (whom, other) in _decoded(answers) if whom == whose}
        for what in ("digest", "settings"):
            for rank, other in others.items():
                if patience and other[what] != mine[what]:
                    raise ValueError(
                        f"global_gradient: expected the same on every rank, got {what} {_told(mine, what)} on this one "
                        f"and {_told(other, what)} on rank {rank}; give all of them copies of one file and the same "
                        "settings"
                    )
        if patience and len(answers) < world_size():
            silent = sorted(set(range(world_size())) - set(answers))
            warnings.warn(
                f"global_gradient: ranks {silent} have taken no step with this optimizer within {PATIENCE:g} s; "
                "whether they use the same file is not known",
                stacklevel=5,
            )
        self._compared = True

    def take_over(self, saved: dict[str, Any] | None) -> None:
        """T and a named k₀ of the saved run, where this one still awaits them."""
        settings = (saved or {}).get("settings", {})
        if self.awaits_total_steps and settings.get("total_steps"):
            self._settle(settings["total_steps"], settings["boost"] if self.rule else None)


def _decoded(answers: dict[int, str]) -> list[tuple[int, Any]]:
    return [(rank, json.loads(answer)) for rank, answer in answers.items()]


def _told(identity: dict[str, Any], what: str) -> str:
    """One side of a disagreement."""
    if identity["digest"] is None:
        return "none"
    return f"{identity[what]} ({identity['path'] or 'in memory'})"


def _on_device(value: Any, device: torch.device) -> torch.Tensor:
    """What a user's function returned, a number or a tensor, as float64 on ``device``; no copy from the host."""
    if torch.is_tensor(value):
        return value.to(torch.float64) if value.device == device else value.to(device, torch.float64, non_blocking=True)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _is_function(boost: Any) -> TypeGuard[BoostSchedule]:
    return callable(boost) and not isinstance(boost, type)


def _checked_total_steps(total_steps: Any) -> int:
    if isinstance(total_steps, (str, int)) and not (isinstance(total_steps, int) and total_steps >= 1):
        raise ValueError(f"total_steps: expected at least 1 optimizer step, got {total_steps!r}")
    return check_integer("total_steps", total_steps, 1)


def _checked_anchor(anchor: str | float, global_gradient: GlobalGradient | None) -> float:
    """λ; a named one, which follows from the learning rate, as 1 until then, and 0 where the file has no curvature."""
    if isinstance(anchor, str):
        check_name("anchor", anchor, ANCHORS)
        return float(global_gradient is not None and bool(global_gradient.curvature_records))
    if not 0.0 <= check_number("anchor", anchor, "a name or a number >= 0") < float("inf"):
        raise ValueError(f"anchor: expected a name or a number >= 0, got {anchor}")
    if anchor > 0 and (global_gradient is None or not global_gradient.curvature_records):
        raise ValueError(
            f"anchor: expected a global gradient collected with curvature, got {anchor:g} without; collect it with "
            "collect_global_gradient(..., curvature=64)"
        )
    return float(anchor)


def _checked(
    total_steps: int | str | None,
    boost: str | float | BoostSchedule,
    boost_max: float,
    correction: str | Correction,
    scope: str,
    bounds: tuple[float, float],
) -> StepSettings:
    """The settings, each checked; a function in place of a name leaves the neutral value."""
    steps = 0 if total_steps in (None, "later") else _checked_total_steps(total_steps)
    if not 0.0 <= check_number("boost_max", boost_max, "a number in [0, 1]") <= 1.0:
        raise ValueError(f"boost_max: expected a number in [0, 1], got {boost_max}")
    if isinstance(boost, str):
        check_name("boost", boost, BOOSTS)
        k0 = 0.0  # follows from T and the learning rate
    else:
        k0 = (
            0.0
            if callable(boost) and not isinstance(boost, type)
            else check_number("boost", boost, "a name, k0 >= 0 or a function")
        )
        if not 0.0 <= k0 < float("inf"):
            raise ValueError(f"boost: expected a name, k0 >= 0 or a function of (step, total_steps), got {boost}")
    mode = "none" if callable(correction) else check_name("correction", correction, CORRECTIONS)
    check_name("correction_scope", scope, CORRECTION_SCOPES)
    check_type("correction_bounds", bounds, (tuple, list))
    ends = [check_number("correction_bounds", bound) for bound in bounds]
    if len(ends) != 2 or not 0.0 <= ends[0] <= ends[1]:
        raise ValueError(f"correction_bounds: expected 0 <= alpha_min <= alpha_max, got {bounds}")
    if mode in PROJECTIONS:
        steps, k0 = 0, 0.0
    return StepSettings(k0, steps, float(boost_max), mode, scope, (float(bounds[0]), float(bounds[1])))


def check_group(group: dict[str, Any]) -> None:
    """Refuse what no kernel here does, in the constructor, a group of its own or a loaded state dict alike."""
    lr, betas = group["lr"], group["betas"]
    if torch.is_tensor(lr) and lr.numel() != 1:
        raise ValueError(f"lr: expected a number or a tensor of one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not check_number(name, group[name], "a number >= 0") >= 0.0:
            raise ValueError(f"{name}: expected a number >= 0, got {group[name]}")
    check_type("betas", betas, (tuple, list))
    if len(betas) != 2:
        raise ValueError(f"betas: expected two numbers in [0, 1), got {len(betas)}")
    for i, beta in enumerate(betas):
        if not 0.0 <= check_number(f"betas[{i}]", beta, "a number in [0, 1)") < 1.0:
            raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")
    if group["amsgrad"]:
        raise ValueError("amsgrad: expected False; it needs a third state tensor, which no kernel here updates")
    if group["differentiable"]:
        raise ValueError("differentiable: expected False; the fused step does not record gradients")
    if not group["decoupled_weight_decay"]:
        raise ValueError("decoupled_weight_decay: expected True (AdamW), got False (Adam)")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach, fused: expected at most one of them True, as in torch")

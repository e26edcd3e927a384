"""Schedules: γ_t of the boost and η_t of the annealing (eqs. 2 and 6). Scalars in, scalars out."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from .formats import check_name, check_number, check_type

TOTAL_BOOST = 200.0
"""Numerator of the paper's k₀ = 200/T: Σγ_t ≈ 100 whatever T is."""

AUTO_BOOST_MAX = 0.5
"""Largest k₀ under ``boost="auto"``, ours: below 200 steps the paper's exceeds 1 and would ignore the domain."""

AUTO_BOOST_REACH = 3e-3
"""Largest k₀ · T · η₀ under ``boost="auto"``, ours: it bounds how far θ follows the one direction ĝ_G, which has no
noise that would average out, and which holds near the base model only (``bench/quality/README.md``)."""

BOOSTS = ("auto", "paper")
SHAPES = ("linear", "cosine", "constant")


ANCHORS = ("auto",)
AUTO_ANCHOR = 0.04
"""λ · η₀ under ``anchor="auto"``, ours. Adam divides the sum g_D + λHδ by its own size, so a step moves a weight by
about η whatever λ is: the smaller η, the larger λ has to be for the same pull. Best was 0.02 to 0.07 on a model of
0.2 M parameters (rates 1e-3 and 3e-3, 40 steps), 0.03 to 0.05 on one of 4.2 M (1e-3, 200 steps), 0.03 to 0.09 on a
pretrained one of 268 M (3e-5, 80 steps); see ``bench/quality/README.md``."""


def initial_boost(rule: str, total_steps: int, lr: float) -> float:
    """k₀ by name: ``"paper"`` is 200/T (eq. 2); ``"auto"`` is min(200, 0.003/η₀)/T, at most 0.5.

    Args:
        rule: one of :data:`BOOSTS`.
        total_steps: T.
        lr: η₀, the learning rate that the run starts from.
    """
    check_name("boost", rule, BOOSTS)
    if rule == "paper":
        return TOTAL_BOOST / total_steps
    total = min(TOTAL_BOOST, AUTO_BOOST_REACH / lr) if lr > 0.0 else TOTAL_BOOST
    return min(total / total_steps, AUTO_BOOST_MAX)


def initial_anchor(lr: float, calibration: float | None) -> float:
    """λ of ``anchor="auto"``: 0.04/η₀, at least κ.

    Args:
        lr: η₀, the learning rate that the run starts from.
        calibration: κ, with which the general loss weighs as much as the domain's; None where nobody measured it.
    """
    return max(AUTO_ANCHOR / lr if lr > 0.0 else 0.0, calibration or 1.0)


def gamma(step: int, total_steps: int, boost: float, boost_max: float = 1.0) -> float:
    """Weight of the global gradient at ``step``: γ_t = k₀ · (1 − t/T), clamped to [0, boost_max]  (eq. 2).

    Args:
        step: t, optimizer steps done so far; γ is 0 for t ≥ T.
        total_steps: T.
        boost: k₀.
        boost_max: upper clamp, in [0, 1].
    """
    return min(max(boost * (1.0 - step / total_steps), 0.0), boost_max)


def annealing_factor(step: int, total_steps: float, warmup_steps: float = 0, shape: str = "linear") -> float:
    """η_t/η_0: (t+1)/(W+1) during W warm-up steps, then decay over the remaining steps to 0 at t = T (eq. 6: linear).

    Args:
        step: t, scheduler steps done so far.
        total_steps: T.
        warmup_steps: W.
        shape: ``"linear"`` (eq. 6), ``"cosine"`` or ``"constant"`` (no decay).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def annealing_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, shape: str = "linear"
) -> LambdaLR:
    """A torch scheduler for annealing learning: lr_t = lr_0 · :func:`annealing_factor`.

    The paper says only that the initial rate is very small and decays to 0; linear is our reading.

    Args:
        optimizer: any torch optimizer; its groups' ``lr`` are the initial rates η_0.
        total_steps: T, optimizer steps (not micro-batches); the rate is 0 from step T on unless it is constant.
        warmup_steps: linear warm-up before the decay, 0 ≤ W < T.
        shape: ``"linear"``, ``"cosine"`` or ``"constant"``.

    Raises:
        ValueError: on a shape or on step counts outside their range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.AdamW([weight], lr=1e-6)
        >>> scheduler = annealing_schedule(optimizer, total_steps=4)
        >>> for _ in range(4):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()
        [0.0]
    """
    check_name("shape", shape, SHAPES)
    check_type("optimizer", optimizer, torch.optim.Optimizer)
    if not check_number("total_steps", total_steps) >= 1:
        raise ValueError(f"total_steps: expected at least 1 optimizer step, got {total_steps}")
    if not 0 <= check_number("warmup_steps", warmup_steps) < float(total_steps):
        raise ValueError(f"warmup_steps: expected 0 <= warmup_steps < total_steps={total_steps}, got {warmup_steps}")
    length, warmup = float(total_steps), float(warmup_steps)
    return LambdaLR(optimizer, lambda step: annealing_factor(step, length, warmup, shape))

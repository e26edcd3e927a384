"""The figures of the last step that ``DBAAdamW.metrics()`` gives."""

from __future__ import annotations

import math

from .plan import Plan
from .stepdata import PROJECTIONS, StepSettings


def metrics(plan: Plan, settings: StepSettings, calibration: float = 1.0) -> dict[str, float]:
    """What ``DBAAdamW.metrics`` returns; ``calibration`` is κ."""
    done, skipped = plan.counters.tolist()
    gamma, clip_factor, grad_norm, global_norm = plan.summary.tolist()
    figures: dict[str, float] = {"steps": done, "skipped_steps": skipped}
    if settings.reduce:
        figures |= {"grad_norm": grad_norm, "clip_factor": clip_factor}
    active = plan.last
    if active is not None and any(active.anchors):
        found = [step.figures(settings.anchor) for step in active.anchors if step]
        square, energy = (math.fsum(column) for column in zip(*found, strict=True))
        ratio = math.sqrt(square) / grad_norm if grad_norm > 0 else math.nan
        figures |= {"anchor_ratio": ratio, "predicted_rise": calibration * energy}
    if active is None or not bool((plan.global_sq[active.index] >= 0).any()):
        return figures
    if settings.correction not in PROJECTIONS:
        rest = (1.0 - gamma) * grad_norm * clip_factor
        figures |= {"gamma": gamma, "boost_ratio": gamma * global_norm / rest if rest > 0 else math.nan}
    rows = plan.report[active.index][plan.global_sq[active.index] >= 0]
    for name, column in (("cosine", rows[:, 0]), ("correction", rows[:, 1])):
        figures |= {f"{name}_{kind}": float(getattr(column, kind)()) for kind in ("mean", "min", "max")}
    return figures

"""The figure of ``dba-kernels try``: where each method ends, and its difference from AL at equal domain loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..figures import NATS, legend_below, new_figure, reference_line
from .runs import AL, HALF
from .verdict import Interval, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def trial_figure(points: dict[str, list[Point]], differences: dict[str, Interval]) -> Figure:
    """Changes of general against domain loss with AL's path, and the differences; bars are 95 % intervals."""
    figure = new_figure("Does a global gradient help?", 12, 5)
    left, right = figure.subplots(1, 2)
    changes = {
        arm: [Interval.of([p[i] - b[i] for p, b in zip(reached, points["base"], strict=True)]) for i in (0, 1)]
        for arm, reached in points.items()
    }
    path = [[interval.mean for interval in changes[arm]] for arm in ("base", HALF, AL)]
    left.plot(*zip(*path, strict=True), color="gray", linewidth=0.8, label="AL's path")
    for arm, (domain, general) in changes.items():
        if arm != "base":
            left.errorbar(
                [domain.mean], [general.mean], xerr=[domain.half], yerr=[general.half], fmt="o", capsize=3, label=arm
            )
    left.set(xlabel=f"change of domain loss ({NATS})", ylabel=f"change of general loss ({NATS})")
    left.set_title("from the base model; lower left is better")
    reference_line(left, 0.0, "base")
    legend_below(left)
    for at, interval in enumerate(differences.values()):
        right.errorbar([at], [interval.mean], yerr=[interval.half], fmt="o", capsize=4, color="tab:blue")
    right.set_xticks(range(len(differences)), list(differences))
    right.set(ylabel=f"general loss − AL's ({NATS})", xlim=(-0.5, len(differences) - 0.5))
    right.set_title("at equal domain loss, ± 95 % over seeds")
    reference_line(right, 0.0, "AL")
    return figure

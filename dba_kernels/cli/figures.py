"""Figures of a run: losses, learning rate, and what the method did at each step.

Each is built first and saved afterwards. Axes name their quantity and its unit; legends stand outside the axes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .held_out import KINDS
from .output import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ADAMW, DBA, GENERAL = "tab:gray", "tab:blue", "tab:orange"
COLOURS = {"domain": DBA, "general": GENERAL}
NATS = "nats/token"

_CACHED = re.compile(r"-\d+-\d+$")


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure, inches; no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, format="png")


def short_name(source: str) -> str:
    """What a title calls a model or a text: the last part of its path, without what the cache adds to it."""
    return _CACHED.sub("", source.rstrip("/").rpartition("/")[2])


def legend_below(axes: Axes) -> None:
    """A legend under the axis label, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize="small", frameon=False)


def reference_line(axes: Axes, value: float, label: str) -> None:
    """A dotted line at the value that means "no effect", named at its right end."""
    axes.axhline(value, color="black", linewidth=0.8, linestyle=":", label=label)
    place = axes.get_yaxis_transform()
    axes.text(0.99, value, label, transform=place, ha="right", va="bottom", fontsize="x-small")


def require_matplotlib() -> None:
    """
    Raises:
        InputError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"figures are drawn with matplotlib ({error}); run: pip install matplotlib") from error


def draw_method(axes: dict[str, Any], metrics: list[dict[str, float]]) -> None:
    """γ, φ and α of each step, on the axes "gamma", "cosine" and "correction"."""
    steps = range(1, len(metrics) + 1)
    axes["gamma"].plot(steps, [m["gamma"] for m in metrics], color=DBA)
    axes["gamma"].set(title="weight of the global gradient", xlabel="step", ylabel="γ (share of 1)", ylim=(0, None))
    axes["gamma"].xaxis.get_major_locator().set_params(integer=True)
    shown = (
        ("cosine", "φ (cosine)", "domain · global gradient", 0.0, "φ = 0"),
        ("correction", "α (factor)", "correction of the update", 1.0, "α = 1"),
    )
    for name, quantity, title, neutral, label in shown:
        mean, low, high = ([m[f"{name}_{part}"] for m in metrics] for part in ("mean", "min", "max"))
        axes[name].plot(steps, mean, color=DBA)
        axes[name].fill_between(steps, low, high, color=DBA, alpha=0.15)
        axes[name].set(xlabel="step", ylabel=quantity)
        axes[name].set_title(f"{title}\n(mean, min to max over tensors)", fontsize="medium")
        reference_line(axes[name], neutral, label)


def run_figure(lines: list[dict[str, Any]], title: str) -> Figure:
    """The metrics of one fine-tuning run (lines of ``metrics.jsonl``)."""
    steps = [line for line in lines if line["step"] > 0]
    boosted = all(line.get("gamma") is not None and line.get("cosine_mean") is not None for line in steps)
    kinds = [kind for kind, prefix in KINDS.items() if any(f"{prefix}_loss" in line for line in lines)]
    figure = new_figure(title, 13, 7 if boosted else 4)
    first = ["loss", "change", "lr"] if kinds else ["loss", "loss", "lr"]
    rows: list[Any] = [first, ["gamma", "cosine", "correction"]]
    axes = figure.subplot_mosaic(rows if boosted else rows[:1])
    axes["loss"].plot([line["step"] for line in steps], [line["loss"] for line in steps], color=ADAMW, label="training")
    for kind in kinds:
        _draw_held_out(axes, lines, kind)
    axes["loss"].set(title="loss per target token", xlabel="step", ylabel=f"loss ({NATS})")
    legend_below(axes["loss"])
    if kinds:
        axes["change"].set(title="held-out change from the start", xlabel="step", ylabel=f"change of loss ({NATS})")
        reference_line(axes["change"], 0.0, "as before")
        legend_below(axes["change"])
    axes["lr"].plot([line["step"] for line in steps], [line["lr"] for line in steps], color=DBA)
    axes["lr"].set(title="learning rate", xlabel="step", ylabel="η (per step)", ylim=(0, None))
    if boosted:
        draw_method(axes, steps)
    return figure


def _draw_held_out(axes: dict[str, Any], lines: list[dict[str, Any]], kind: str) -> None:
    """The held-out losses of one kind, and their changes with standard errors, on "loss" and "change"."""
    prefix, colour = KINDS[kind], COLOURS[kind]
    measured = [line for line in lines if line.get(f"{prefix}_loss") is not None]
    at = [line["step"] for line in measured]
    axes["loss"].plot(at, [line[f"{prefix}_loss"] for line in measured], "o-", color=colour, label=f"held out, {kind}")
    changes = [line.get(f"{prefix}_change", 0.0 if line["step"] == 0 else math.nan) for line in measured]
    errors = [line.get(f"{prefix}_change_error") or 0.0 for line in measured]
    axes["change"].errorbar(at, changes, yerr=errors, fmt="o-", capsize=3, color=colour, label=f"{kind}, ± std. error")

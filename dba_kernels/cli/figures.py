"""Figures of a run: losses, learning rate, and what the method did at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .output import InputError

ADAMW, DBA = "tab:gray", "tab:blue"


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
    axes["gamma"].set(title="γ: weight of the global gradient", xlabel="step", ylim=(0, None))
    for name, label in (("cosine", "φ: domain · global gradient"), ("correction", "α: correction of the update")):
        mean, low, high = ([m[f"{name}_{part}"] for m in metrics] for part in ("mean", "min", "max"))
        axes[name].plot(steps, mean, color=DBA)
        axes[name].fill_between(steps, low, high, color=DBA, alpha=0.15)
        axes[name].set(xlabel="step")
        axes[name].set_title(f"{label}\n(mean, min to max over tensors)", fontsize="medium")


def draw_run(path: Path, lines: list[dict[str, Any]], title: str) -> None:
    """The metrics of one fine-tuning run (lines of ``metrics.jsonl``), as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["step"] > 0]
    boosted = all(line.get("gamma") is not None and line.get("cosine_mean") is not None for line in steps)
    figure = Figure(figsize=(12, 6 if boosted else 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    rows: list[Any] = [["loss", "loss", "lr"], ["gamma", "cosine", "correction"]]
    axes = figure.subplot_mosaic(rows if boosted else rows[:1])
    axes["loss"].plot([line["step"] for line in steps], [line["loss"] for line in steps], color=ADAMW, label="training")
    if evaluated := [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]:
        axes["loss"].plot(*zip(*evaluated, strict=True), "o-", color=DBA, label="held out")
    axes["loss"].set(title="loss per target token", xlabel="step")
    axes["loss"].legend()
    axes["lr"].plot([line["step"] for line in steps], [line["lr"] for line in steps], color=DBA)
    axes["lr"].set(title="η: learning rate", xlabel="step", ylim=(0, None))
    if boosted:
        draw_method(axes, steps)
    figure.savefig(path, dpi=120, format="png")

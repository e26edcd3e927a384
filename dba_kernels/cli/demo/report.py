"""How the demo shows its outcome: the table of losses, what it says, and the figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..figures import ADAMW, DBA, NATS, draw_method, legend_below, new_figure, reference_line
from ..grids import Grid
from .training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Outcome:
    """A model's held-out losses, one per block, fp32 ``[blocks]``, and the run that led to it (None: the base)."""

    domain: torch.Tensor
    general: torch.Tensor
    run: Run | None = None

    def as_json(self) -> dict[str, Any]:
        losses = {"domain": self.domain.tolist(), "general": self.general.tolist()}
        return losses | (asdict(self.run) if self.run else {})


def losses_table(outcomes: dict[str, Outcome], tokens: int, title: str) -> Grid:
    """One row per model: losses, their change from the first row (the base), seconds and bytes per parameter."""
    title = (
        f"{title}\nheld-out loss in nats per token, {tokens:,} evaluation tokens per corpus; change from the base model"
    )
    values = ("domain", "change", "general", "change", "seconds", "of it in step()", "bytes/parameter")
    table = Grid(title, ("model",), values)
    base = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        cells = []
        for losses, reference in ((outcome.domain, base.domain), (outcome.general, base.general)):
            change = (losses - reference).mean().item()
            cells += [f"{losses.mean().item():.4f}", f"{change:+.4f}" if outcome is not base else "–"]
        run = outcome.run
        cost = [run.seconds, run.optimizer_seconds, run.bytes_per_parameter] if run else []
        table.add(name, *cells, *(f"{figure:.2f}" for figure in cost), *(["–"] * (3 - len(cost))))
    return table


def paired(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Mean of ``a − b`` over the blocks that both were measured on, and its standard error."""
    difference = (a - b).double()
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()


def verdict(base: Outcome, adamw: Outcome, dba: Outcome) -> str:
    """What the evaluation says about DBA against AdamW, and what it cannot say."""
    lines = []
    for corpus in ("general", "domain"):
        mean, error = paired(getattr(dba, corpus), getattr(adamw, corpus))
        words = "no difference beyond the noise" if abs(mean) < 2 * error else "lower" if mean < 0 else "higher"
        lines.append(f"DBA − AdamW, {corpus} loss: {mean:+.4f} ± {error:.4f} ({words})")
    if (adamw.general - base.general).mean() <= 0:
        lines.append("AdamW forgot nothing here: its general loss fell too, so this run shows no forgetting avoided.")
    lines.append("± is the standard error over the evaluation blocks. One seed: a lead, not a result.")
    return "\n".join(lines)


def demo_figure(outcomes: dict[str, Outcome], title: str) -> Figure:
    """Training losses and their difference, changes of the held-out losses, and γ, φ, α over the steps."""
    figure = new_figure(title, 14, 7)
    axes = figure.subplot_mosaic(
        [["train", "difference", "domain", "general"], ["gamma", "gamma", "cosine", "correction"]]
    )
    base, adamw, dba = outcomes.values()
    colours = dict(zip(outcomes, ("black", ADAMW, DBA), strict=True))
    for name, outcome in outcomes.items():
        if outcome.run:
            losses = outcome.run.losses
            axes["train"].plot(range(1, len(losses) + 1), losses, label=name, color=colours[name])
    axes["train"].set(title="training loss (domain)", xlabel="step", ylabel=f"loss ({NATS})")
    legend_below(axes["train"])
    if adamw.run and dba.run:
        differences = [b - a for a, b in zip(adamw.run.losses, dba.run.losses, strict=True)]
        axes["difference"].plot(range(1, len(differences) + 1), differences, color=DBA)
        draw_method(axes, dba.run.metrics)
    axes["difference"].set(title="DBA − AdamW, same batches", xlabel="step", ylabel=f"difference ({NATS})")
    reference_line(axes["difference"], 0.0, "equal")
    for corpus in ("domain", "general"):
        changes = {name: paired(getattr(o, corpus), getattr(base, corpus)) for name, o in outcomes.items() if o.run}
        draw_changes(axes[corpus], changes, colours)
        axes[corpus].set_title(f"held-out loss ({corpus})\n(± standard error over blocks)", fontsize="medium")
    return figure


def draw_changes(axes: Axes, changes: dict[str, tuple[float, float]], colours: dict[str, Any]) -> None:
    """Changes from the base model, (mean, ±) by name, with error bars and the line of no change."""
    for at, (name, (mean, error)) in enumerate(changes.items()):
        axes.errorbar([at], [mean], yerr=[error], fmt="o", capsize=4, color=colours[name])
        axes.annotate(f"{mean:+.3f}", (at, mean), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(changes)), list(changes))
    axes.set(ylabel=f"change from base ({NATS})", xlim=(-0.5, len(changes) - 0.2))
    reference_line(axes, 0.0, "base")

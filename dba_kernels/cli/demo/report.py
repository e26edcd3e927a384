"""How the demo shows its outcome: the table of losses, what it says, and the figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..figures import ADAMW, DBA, draw_method
from .training import Run


@dataclass(frozen=True)
class Outcome:
    """A model's held-out losses, one per block, fp32 ``[blocks]``, and the run that led to it (None: the base)."""

    domain: torch.Tensor
    general: torch.Tensor
    run: Run | None = None

    def as_json(self) -> dict[str, Any]:
        losses = {"domain": self.domain.tolist(), "general": self.general.tolist()}
        return losses | (asdict(self.run) if self.run else {})


def losses_table(outcomes: dict[str, Outcome], tokens: int, title: str) -> Table:
    """One row per model: losses, their change from the first row (the base), seconds and bytes per parameter."""
    table = Table(title=f"{title}\nheld-out loss per token, {tokens:,} evaluation tokens per corpus")
    table.add_column("")
    for heading in ("domain", "change", "general", "change", "seconds", "of it in step()", "bytes/parameter"):
        table.add_column(heading, justify="right")
    base = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        cells = []
        for losses, reference in ((outcome.domain, base.domain), (outcome.general, base.general)):
            change = (losses - reference).mean().item()
            cells += [f"{losses.mean().item():.4f}", f"{change:+.4f}" if outcome is not base else "–"]
        run = outcome.run
        cost = [run.seconds, run.optimizer_seconds, run.bytes_per_parameter] if run else []
        table.add_row(name, *cells, *(f"{figure:.2f}" for figure in cost))
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


def draw(path: Path, outcomes: dict[str, Outcome], title: str) -> None:
    """Losses while training, held-out losses, and γ, φ, α over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["train", "train", "domain", "general"], ["gamma", "gamma", "cosine", "correction"]])
    colours = dict(zip(outcomes, ("black", ADAMW, DBA), strict=True))

    for name, outcome in outcomes.items():
        if outcome.run:
            losses = outcome.run.losses
            axes["train"].plot(range(1, len(losses) + 1), losses, label=name, color=colours[name])
        for corpus in ("domain", "general"):
            loss = getattr(outcome, corpus).mean().item()
            axes[corpus].plot([name], [loss], "o", color=colours[name])
            axes[corpus].annotate(f"{loss:.3f}", (name, loss), xytext=(0, 7), textcoords="offset points", ha="center")
    axes["train"].set(title="training loss (domain)", xlabel="step")
    axes["train"].legend()
    for corpus in ("domain", "general"):
        axes[corpus].set_title(f"held-out loss ({corpus})")
        axes[corpus].margins(0.25)

    draw_method(axes, list(outcomes.values())[-1].run.metrics)  # type: ignore[union-attr]
    figure.savefig(path, dpi=120, format="png")

"""How far the stored global gradient holds: general loss along −ĝ_G from the base model, with no domain in play.

A first-order gradient is valid near θ₀ only. This measures how near, and what is to be gained there: the most that any
boost can hope for.
"""

from __future__ import annotations

import torch

from bench.quality import data, model, training
from bench.quality.optimizers import GeneralStatistics
from bench.quality.setting import Setting

DISTANCES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # Euclidean, over all parameters


def signal_to_noise(statistics: GeneralStatistics, batches: int) -> float:
    """Energy of the true mean gradient over the noise left in the average of ``batches`` batches."""
    mean = sum(g.square().sum().item() for g in statistics.mean.values())
    spread = sum((s - statistics.mean[n] ** 2).sum().item() for n, s in statistics.second_moment.items())
    noise = spread / (batches - 1)
    return (mean - noise) / noise


@torch.no_grad()
def table() -> str:
    """Markdown: general test loss after a move along the raw and along the Adam-scaled direction."""
    network = model.load_base()
    parameters = training.named_parameters(network)
    setting = Setting("recipes", "", 0.0)
    with torch.enable_grad():
        statistics = training.base_statistics(network, setting)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    test = data.evaluation("general", "test", training.TEST_DOCUMENTS)
    directions = {
        "ĝ_G": statistics.mean,
        "ĝ_G / √E[g²]": {n: g / (statistics.second_moment[n].sqrt() + 1e-8) for n, g in statistics.mean.items()},
    }
    lines = [
        f"signal to noise of ĝ_G from {setting.batches} batches: {signal_to_noise(statistics, setting.batches):.2f}; "
        f"general loss of the base model: {model.mean_loss(network, test):.4f}\n",
        "| distance from θ₀ | mean move of a parameter | " + " | ".join(f"along −{n}" for n in directions) + " |",
        "| --- " * (2 + len(directions)) + "|",
    ]
    count = sum(p.numel() for p in parameters.values())
    for distance in DISTANCES:
        cells = [f"{distance:g}", f"{distance / count**0.5:.1e}"]
        for direction in directions.values():
            length = sum(d.square().sum().item() for d in direction.values()) ** 0.5
            for name, parameter in parameters.items():
                parameter.copy_(start[name] - direction[name] * (distance / length))
            cells.append(f"{model.mean_loss(network, test):.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

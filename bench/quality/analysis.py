"""Numbers of the report: losses, joint scores, matched domain loss, paired bootstrap over documents."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from bench.quality import data, grid, training
from bench.quality.choose import harmonic
from bench.quality.results import Record
from bench.quality.setting import Setting

RESAMPLES = 4000
Vector = np.ndarray


@dataclass(frozen=True)
class Weights:
    """Predicted tokens of each test document: the weights that turn documents' means into a loss per token."""

    domain: Vector
    general: Vector

    @classmethod
    def of(cls, domain: str) -> Weights:
        counts = [
            (data.evaluation(corpus, "test", training.TEST_DOCUMENTS)[:, 1:] >= 0).sum(1).numpy()
            for corpus in (domain, "general")
        ]
        return cls(*counts)


@dataclass(frozen=True)
class Point:
    """Test results of one setting, averaged over its seeds: losses per document in nats, accuracies per seed."""

    domain: Vector  # [documents]
    general: Vector
    domain_loss: Vector  # [seeds]
    general_loss: Vector
    joint: Vector


def losses(record: Record, side: str) -> Vector:
    """Mean loss of each test document, in nats: ``[documents]``."""
    return np.array(record[side]["millinats"]) / 1000


def accuracy(record: Record, side: str, weight: Vector) -> float:
    """Share of next tokens that the model's first guess hits."""
    return sum(record[side]["hits"]) / float(weight.sum())


def point(
    setting: Setting, records: dict[str, Record], weights: Weights, seeds: tuple[int, ...] = grid.SEEDS
) -> Point | None:
    """Those of ``seeds`` that are done, or None."""
    keys = [dataclasses.replace(setting, seed=seed).key() for seed in seeds]
    found = [records[key] for key in keys if key in records]
    if not found:
        return None
    domain = np.array([losses(r, "domain") for r in found])
    general = np.array([losses(r, "general") for r in found])
    joint = [harmonic(accuracy(r, "domain", weights.domain), accuracy(r, "general", weights.general)) for r in found]
    return Point(
        domain.mean(0),
        general.mean(0),
        np.average(domain, axis=1, weights=weights.domain),
        np.average(general, axis=1, weights=weights.general),
        np.array(joint),
    )


def interval(difference: Vector, weight: Vector) -> tuple[float, float, float]:
    """Mean per token of a per-document difference and its 95 % interval, from a bootstrap over documents."""
    rows = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    means = (difference * weight)[rows].sum(1) / weight[rows].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.average(difference, weights=weight)), float(low), float(high)


def matched(curve: list[Point], target: float, weights: Weights) -> Vector | None:
    """General losses per document where a curve (points in the order of the learning rate) reaches a domain loss.

    Linear between the two neighbouring learning rates that bracket ``target``; the best general loss where the curve
    crosses several times. A point within 0.02 nat stands for itself where nothing brackets. None where neither exists.
    """
    level = [float(np.average(p.domain, weights=weights.domain)) for p in curve]
    found = []
    for (left, a), (right, b) in zip(
        zip(curve, level, strict=True), list(zip(curve, level, strict=True))[1:], strict=False
    ):
        if a != b and min(a, b) <= target <= max(a, b):
            share = (target - a) / (b - a)
            found.append((1 - share) * left.general + share * right.general)
    if not found:
        found = [p.general for p, value in zip(curve, level, strict=True) if abs(value - target) <= 0.02]
    if not found:
        return None
    return min(found, key=lambda general: float(np.average(general, weights=weights.general)))


def best_matched(
    method: str, domain: str, records: dict[str, Record], target: float, weights: Weights
) -> Vector | None:
    """The lowest ``matched`` general loss of a method's family.

    Curves run along the learning rates of each option, and along the options (replay share, interpolation, strength of
    a pull) at each learning rate. All of the first seed: every curve has it, and the same data order.
    """
    curves: dict[object, list[Point]] = defaultdict(list)
    for setting in grid.curve(method, domain):
        found = point(setting, records, weights, (0,))
        if found is not None:
            curves[dataclasses.replace(setting, lr=0.0)].append(found)
            curves[setting.lr].append(found)
    options = [general for curve in curves.values() if (general := matched(curve, target, weights)) is not None]
    return min(options, key=lambda general: float(np.average(general, weights=weights.general)), default=None)

"""Numbers of the report: answer losses, normalised and joint scores, choices, intervals from a bootstrap over items."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import jsonl
from bench.regime import data, grid
from bench.regime.setting import Setting

RESULTS = Path(__file__).parent / "results.jsonl"
RESAMPLES = 4000
Record = dict[str, Any]
Records = dict[str, Record]


def load(path: Path = RESULTS) -> Records:
    return {record["key"]: record for record in jsonl.load(path)}


def loss(scores: Record, name: str) -> float:
    """Nats per answer token of one set."""
    return sum(scores[name]["millinats"]) / 1000 / sum(scores[name]["tokens"])


def domain_loss(record: Record, part: str = "test") -> float:
    names = record["setting"]["domain"].split("+")
    return float(np.mean([loss(record[part], name) for name in names]))


def general_loss(record: Record, sets: tuple[str, ...] = (*data.SEEN, *data.UNSEEN), part: str = "test") -> float:
    """Mean over the sets: each weighs the same."""
    return float(np.mean([loss(record[part], name) for name in sets]))


def accuracy(record: Record, name: str) -> float | None:
    right = record["test"][name].get("right")
    return None if right is None else float(np.mean(right))


def joint(domain: float, general: float, base: tuple[float, float]) -> float:
    """Harmonic mean of the domain and the general score, each normalised by the base model's.

    A score is exp(−loss), the geometric mean of the answer tokens' probabilities. The paper's reviewers say that both
    scores are normalised before their harmonic mean is taken; that the base model is what they are divided by is our
    reading.
    """
    own, other = np.exp(base[0] - domain), np.exp(base[1] - general)
    return float(2 * own * other / (own + other))


def joint_of(record: Record, base: Record, part: str = "test") -> float:
    start = domain_loss(base, part), general_loss(base, part=part)
    return joint(domain_loss(record, part), general_loss(record, part=part), start)


def choice(method: str, model: str, domain: str, records: Records) -> Setting | None:
    """The setting of a family with the best joint score on validation items, first seed.

    On a confirming domain the one that is best on average over the tuned domains: nothing is chosen there.
    """
    sources = [domain] if domain in grid.TUNED else list(grid.TUNED)
    found: dict[Setting, list[float]] = defaultdict(list)
    for source in sources:
        start = records.get(grid.base(model, source).key())
        for setting in grid.family(method, model, source):
            record = records.get(setting.key())
            if start is not None and record is not None:
                found[dataclasses.replace(setting, domain=domain)].append(joint_of(record, start, "valid"))
    complete = {s: float(np.mean(v)) for s, v in found.items() if len(v) == max(map(len, found.values()))}
    return max(complete, key=lambda s: complete[s]) if complete else None


def seeds_of(setting: Setting, records: Records) -> list[Record]:
    keys = [dataclasses.replace(setting, seed=seed).key() for seed in grid.SEEDS]
    return [records[key] for key in keys if key in records]


def difference(own: list[Record], other: list[Record], sets: tuple[str, ...]) -> tuple[float, float, float]:
    """Mean over ``sets`` of loss(own) − loss(other), seeds averaged, and its paired 95 % interval over items."""
    draw, total = np.random.default_rng(0), np.zeros(RESAMPLES)
    point = 0.0
    for name in sets:
        tokens = np.array(own[0]["test"][name]["tokens"])
        sides = [np.mean([r["test"][name]["millinats"] for r in records], axis=0) / 1000 for records in (own, other)]
        change = sides[0] - sides[1]
        rows = draw.integers(0, len(tokens), (RESAMPLES, len(tokens)))
        total += change[rows].sum(1) / tokens[rows].sum(1) / len(sets)
        point += float(change.sum() / tokens.sum()) / len(sets)
    low, high = np.percentile(total, (2.5, 97.5))
    return point, float(low), float(high)


def general_at(method: str, model: str, domain: str, target: float, records: Records) -> float | None:
    """A method's general loss where it reaches a domain loss, by interpolation between its learning rates.

    A rate that does better on both sides counts; None where no rate reaches ``target``.
    """
    points = []
    for setting in grid.family(method, model, domain):
        if (record := records.get(setting.key())) is not None:
            points.append((domain_loss(record), general_loss(record)))
    points.sort()
    found = [general for own, general in points if own <= target]
    for (a, left), (b, right) in itertools.pairwise(points):
        if a <= target <= b and a != b:
            found.append(left + (right - left) * (target - a) / (b - a))
    return min(found, default=None)

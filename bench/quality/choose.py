"""Which setting stands for a method: the same rule for all, on validation documents only.

On a tuning domain a method stands with the setting of its family that has the best joint score (harmonic mean of the
domain and general next-token accuracies) on that domain's validation documents, first seed. On a confirming domain it
stands with the setting that is best on average over the tuning domains: nothing is chosen there.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from bench.quality import data, grid, results
from bench.quality.results import Record
from bench.quality.setting import Setting


def harmonic(domain: float, general: float) -> float:
    """Harmonic mean of two accuracies, 0 where both vanish."""
    return 2 * domain * general / (domain + general) if domain + general else 0.0


def valid_score(record: Record) -> float:
    """Joint score on the validation documents."""
    return harmonic(record["domain"]["valid_accuracy"], record["general"]["valid_accuracy"])


def choice(method: str, domain: str) -> Setting | None:
    """The setting that stands for ``method`` on ``domain``; None while its family has no result."""
    sources = grid.TUNED if domain in data.CONFIRMING else [domain]
    scores: dict[Setting, list[float]] = defaultdict(list)
    for source in sources:
        records = results.load(source)
        for setting in grid.family(method, source):
            if setting.key() in records:
                scores[dataclasses.replace(setting, domain=domain)].append(valid_score(records[setting.key()]))
    complete = {s: sum(v) / len(v) for s, v in scores.items() if len(v) == max(map(len, scores.values()))}
    if not complete:
        return None
    best = max(complete, key=lambda s: complete[s])
    return dataclasses.replace(best, method=method)

"""The grid: every family of settings, and which trainings they need. (What is run when: ``stages.py``.)"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from bench.quality import data
from bench.quality.setting import Setting

Options = dict[str, Any]
LRS = data.SIZE.rates
BETWEEN = (1.7e-4, 5.5e-4)  # AL alone runs here too: chords of its convex curve would flatter whoever meets it
SEEDS = (0, 1, 2)
STEPS = data.SIZE.steps
K0 = 200 / STEPS  # eq. 2
DBA: Options = {"boost": K0, "correction": "cosine"}
ANCHOR: Options = {"metric": "fisher"}
MEMORY: Options = {"memory": data.SIZE.memory}  # one weight and one rank for every domain and rate

# Each family is one method with the settings a user would search over besides the learning rate.
FAMILIES: dict[str, list[Options]] = {
    "AdamW": [{"anneal": False}],
    "AL": [{}],
    "DBA": [DBA],
    "replay": [{"replay": r} for r in (0.10, 0.25, 0.50)],
    "WiSE-FT": [{"interpolate": i} for i in (0.3, 0.5, 0.7, 0.85)],
    "DBA, no correction": [{"boost": K0}],
    "DBA, no boost": [{"correction": "cosine"}],
    "DBA, no annealing": [{**DBA, "anneal": False}],
    "seeded v": [{"seed_v": True}],
    "anchor, Fisher": [{"anchor": 30.0, **ANCHOR}],
    "anchor, uniform": [{"anchor": 30.0}],
    "L2-SP": [{"anchor": c, "anchor_of": "gradient"} for c in (0.01, 0.1)],
    "LoRA": [{"adapter_rank": 16}],
    "GaLore": [{"galore_rank": 64}],
    "DBA, small boost": [{**DBA, "boost": b, "boost_max": b} for b in (0.05,)],
    "DBA, global scope": [{**DBA, "scope": "global"}],
    "A-GEM": [{"correction": "agem"}],
    "PCGrad": [{"correction": "pcgrad"}],
    "boost of update": [{"boost": b, "boost_max": b, "boost_of": "update"} for b in (0.1, 0.3)],
    "DBA, refreshed": [{**DBA, "refresh": k} for k in (4,)],
    "EWC": [{"anchor": c, "anchor_of": "gradient", **ANCHOR} for c in (0.01, 0.1)],
    "seeded v + anchor": [{"seed_v": True, "anchor": c, **ANCHOR} for c in (30.0,)],
    "seeded v + DBA": [{"seed_v": True, **DBA}],
    "seeded v + WiSE-FT": [{"seed_v": True, "interpolate": i} for i in (0.5, 0.7, 0.85)],
    "replay, one to one": [{"replay": 0.5}],
    "memory": [MEMORY],
    "memory + WiSE-FT": [{**MEMORY, "interpolate": i} for i in (0.7, 0.85)],
    "memory, diagonal (EWC's)": [{**MEMORY, "memory_of": "diagonal"}],
    "memory and ĝ_G": [{**MEMORY, "boost": 0.05, "boost_max": 0.05, "shrink": True}],
}
SHIFT = {"LoRA": 3.0}  # adapters want larger rates: their whole grid is shifted
MAIN = ("AdamW", "AL", "replay", "WiSE-FT", "DBA", "seeded v")  # the core

# Swept on every tuning domain with the same learning rates, then repeated with the other seeds and confirmed.
SWEPT = (
    "AL",
    "WiSE-FT",
    "replay",
    "DBA",
    "AdamW",
    "seeded v",
    "seeded v + WiSE-FT",
    "DBA, small boost",
    "anchor, Fisher",
    "memory",
    "memory + WiSE-FT",
)
SWEPT_LRS = (3e-4, 1e-3, 1e-4)  # the middle of the curves comes first
ABLATION_DOMAIN = "recipes"
ABLATION_LRS = (LRS[-2],)
SENSITIVITY_LR = LRS[-2]

SENSITIVITY: dict[str, list[Options]] = {
    "k₀ and boost_max": [{**DBA, "boost": m, "boost_max": m} for m in (0.02, 0.1, 0.25, 0.9)],
    "bounds of α": [{**DBA, "lower": 0.5, "upper": 1.5}, {**DBA, "upper": 1.0}],
    "lagged φ": [{**DBA, "lagged": True}],
    "format": [{**DBA, "storage": s} for s in ("int8", "int4", "rank32")],
    "general batches": [{**DBA, "batches": n} for n in (32,)],
    "general text": [{**DBA, "source": "base"}, {**DBA, "topics": "People"}],
    "T": [{"steps": t, "boost": 200 / t, "correction": "cosine"} for t in (400, 1000)],
    "T (AL)": [{"steps": t} for t in (400, 1000)],
    "T (small boost)": [{**DBA, "steps": 1000, "boost": b, "boost_max": b} for b in (0.05, 0.01)],
    "memory: weight": [{"memory": w} for w in (0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 17.0)],
    "memory: form": [{**MEMORY, "memory_form": f} for f in ("momentum", "implicit")],
    "memory: rank": [{**MEMORY, "memory_rank": r} for r in (4, 16)],
    "memory: no rest": [{**MEMORY, "memory_rank": r, "memory_rest": False} for r in (16, 64)],
    "memory: every": [{**MEMORY, "memory_every": k} for k in (2, 4, 8)],
    "memory: labels": [{**MEMORY, "labels": "sampled"}],
    "memory: general batches": [{**MEMORY, "batches": 32}],
    "memory: steps": [{**MEMORY, "steps": t} for t in (50, 800)],
    "default boost, shrunk": [
        {"lr": lr, "boost": b, "boost_max": b, "shrink": True}
        for lr, b in ((3e-5, 0.5), (1e-4, 0.15), (3e-4, 0.05), (1e-3, 0.015))
    ],
    "default boost": [
        {**DBA, "lr": lr, "boost": b, "boost_max": b}
        for lr, b in ((3e-5, 0.5), (1e-4, 0.15), (3e-4, 0.05), (1e-3, 0.015))
    ],
}


def family(method: str, domain: str, lrs: Iterable[float] = LRS, seed: int = 0) -> Iterator[Setting]:
    """All settings of one family at the given learning rates, each once; an option may have a rate of its own."""
    options = (FAMILIES | SENSITIVITY)[method]
    rates = (lr * SHIFT.get(method, 1.0) for lr in lrs)
    pairs = itertools.product(rates, options)
    shared = {"seed": seed, "steps": STEPS}
    yield from dict.fromkeys(Setting(domain, method, **(shared | {"lr": lr} | option)) for lr, option in pairs)


def curve(method: str, domain: str) -> Iterator[Setting]:
    """All settings of one family, first seed, in the order of the learning rate."""
    return family(method, domain, sorted((*LRS, *BETWEEN)) if method == "AL" else LRS)


def base(domain: str) -> Setting:
    """The base model itself: no step at all."""
    return Setting(domain, "base", 0.0, steps=0)


MEMORY_RIVALS: dict[str, tuple[float, ...]] = {  # the second-order memory's own grid: method and learning rates
    "memory": LRS[-2:],
    "AL": LRS,
    "AdamW": LRS[:-1],
    "replay, one to one": LRS[-2:],
}
TUNED = [d for d in data.DOMAINS if d not in data.CONFIRMING]


def trainings(settings: Iterable[Setting], done: Iterable[str]) -> list[list[Setting]]:
    """Pending settings, those that evaluate the same trained weights together."""
    finished, groups = set(done), {}
    for setting in settings:
        if setting.key() not in finished:
            finished.add(setting.key())
            groups.setdefault(setting.training().key(), []).append(setting)
    return list(groups.values())

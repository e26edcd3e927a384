"""The grid: which settings each stage holds, in the order that answers the most important question first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from bench.regime import data
from bench.regime.setting import Setting

Options = dict[str, Any]
LRS = (3e-5, 1.5e-5, 8e-6)
SEEDS = (0, 1, 2)
DBA: Options = {"boost": "paper", "correction": "cosine"}

# Each family is one method with the settings a user would search over besides the learning rate.
FAMILIES: dict[str, list[Options]] = {
    "AL": [{}],
    "replay 1:1": [{"replay": 1.0}],
    "general first, then AL": [{"first": True}],
    "general first, then memory": [{"first": True, "anchor": "auto"}],
    "general first, then memory, other λ": [{"first": True, "anchor": a} for a in (21.78, 1000.0, 3000.0)],
    "memory": [{"anchor": "auto"}],
    "AdamW, constant rate": [{"anneal": False}],
    "DBA, paper's boost": [DBA],
    "DBA, default boost": [{"boost": "auto", "correction": "cosine"}],
    "LoRA": [{"adapter_rank": 16}],
    "replay 1:4": [{"replay": 0.25}],
    "memory and ĝ_G": [{"anchor": "auto", "boost": "auto"}],
    "DBA, paper's boost, no correction": [{"boost": "paper"}],
    "WiSE-FT": [{"interpolate": i} for i in (0.5, 0.7)],
    "GaLore": [{"galore_rank": 64}],
}
SHIFT = {"LoRA": 10.0}  # adapters want larger rates: their whole grid is shifted
MAIN = (
    "AL",
    "replay 1:1",
    "general first, then AL",
    "general first, then memory",
    "memory",
    "DBA, paper's boost",
    "DBA, default boost",
    "LoRA",
)
TUNED = ("medicine", "law")  # settings are chosen here, and confirmed on the other domains
CORE_RATE = LRS[0]
SWEEP = "general first, then memory, other λ"  # 21.78 is κ; at the core's rate alone
ONE_SET = "NQ-open"  # a memory of one general set alone: does it protect the others?
STAGES = ("core", "rates", "seeds", "confirm", "questions", "second-model")


def base(model: str, domain: str) -> Setting:
    """The base model itself: no step at all."""
    return Setting(model, domain, "base model", 0.0, steps=0)


def family(method: str, model: str, domain: str, lrs: Iterable[float] = LRS, seed: int = 0) -> Iterator[Setting]:
    """All settings of one family, in the order of ``lrs``."""
    for lr, option in itertools.product(lrs, FAMILIES[method]):
        yield Setting(model, domain, method, **({"lr": lr * SHIFT.get(method, 1.0), "seed": seed} | option))


def stage(name: str, records: dict[str, Any]) -> list[Setting]:
    """The settings of one of :data:`STAGES`. Later stages choose from the results in ``records``."""
    from bench.regime.analysis import choice

    model = "gemma"
    match name:
        case "core":
            first = [s for m in MAIN for d in TUNED for s in family(m, model, d, (CORE_RATE,))]
            return [base(model, d) for d in TUNED] + first
        case "rates":
            pairs = [(m, lr) for lr in LRS for m in FAMILIES if lr == CORE_RATE or m != SWEEP]
            return [s for m, lr in pairs for d in TUNED for s in family(m, model, d, (lr,))]
        case "seeds" | "confirm":
            domains, seeds = (TUNED, SEEDS[1:]) if name == "seeds" else (data.DOMAINS[2:], SEEDS[:1])
            chosen = [choice(m, model, d, records) for m in MAIN for d in domains]
            found = [base(model, d) for d in domains] if name == "confirm" else []
            return found + [dataclasses.replace(s, seed=seed) for seed in seeds for s in chosen if s]
        case "questions":
            alone = family("general first, then memory", model, TUNED[0], LRS[:1])
            one = [dataclasses.replace(s, general=ONE_SET) for s in alone]
            pair = [s for m in MAIN[:5] for s in family(m, model, "medicine+law", (CORE_RATE,))]
            return one + pair
        case "second-model":
            return [base("smollm2", d) for d in TUNED] + [
                s for m in MAIN for d in TUNED for s in family(m, "smollm2", d, (CORE_RATE,))
            ]
    raise ValueError(f"stage {name!r}: expected one of {', '.join(STAGES)}")


def trainings(settings: Iterable[Setting], done: Iterable[str]) -> list[list[Setting]]:
    """Pending settings, those that evaluate the same trained weights together."""
    finished, groups = set(done), dict[str, list[Setting]]()
    for setting in settings:
        if setting.key() not in finished:
            finished.add(setting.key())
            groups.setdefault(setting.training().key(), []).append(setting)
    return list(groups.values())

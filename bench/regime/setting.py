"""One run of the study: everything that decides its result, in one frozen record with a stable key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

NAMES = ("model", "domain", "method", "lr", "seed")


@dataclass(frozen=True)
class Setting:
    """A fine-tuning run. Defaults are AdamW with linear decay (AL) on the domain alone.

    The key hashes only what differs from the defaults, so that a new field leaves old results valid.
    """

    model: str
    domain: str  # two joined by "+": the second follows the first
    method: str  # the row's name in the report; decides nothing
    lr: float
    seed: int = 0
    steps: int = 80
    anneal: bool = True  # eq. 6; False keeps the learning rate
    replay: float = 0.0  # general answers per domain answer, on top of the same domain answers
    first: bool = False  # train once on the batches of the collection, and collect there
    adapter_rank: int = 0  # LoRA
    galore_rank: int = 0
    interpolate: float = 1.0  # WiSE-FT: weights θ₀ + interpolate·(θ − θ₀) are evaluated
    boost: str | float = 0.0  # "paper", "auto" or k₀ of eq. 2
    correction: str = "none"
    anchor: float | str = 0.0  # λ of eq. 10
    rank: int = 64  # of the curvature
    general: str = ""  # comma-separated general sets of collection and replay; empty: all that may be seen

    def fields(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and those that name the run."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in NAMES or getattr(self, field.name) != field.default
        }

    def key(self) -> str:
        """Twelve hexadecimal digits that name the run; ``method`` does not enter."""
        fields = {name: value for name, value in self.fields().items() if name != "method"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def training(self) -> Setting:
        """The setting whose trained weights this one evaluates."""
        return dataclasses.replace(self, interpolate=1.0)

    @property
    def boosted(self) -> bool:
        return self.boost != 0.0 or self.correction != "none"

"""One point of the grid: everything that decides a run's result, in one frozen record with a stable key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A fine-tuning run. Defaults are plain AdamW with linear decay on the domain alone.

    The key hashes only what differs from the defaults, so that a new field leaves old results valid.
    """

    domain: str
    method: str  # the row's name in the report; decides nothing
    lr: float
    seed: int = 0
    steps: int = 200
    anneal: bool = True  # eq. 6; False keeps the learning rate
    replay: float = 0.0  # share of general sequences in the stream, on top of the same domain sequences
    interpolate: float = 1.0  # WiSE-FT: weights θ₀ + interpolate·(θ − θ₀) are evaluated
    adapter_rank: int = 0  # LoRA
    galore_rank: int = 0
    boost: float = 0.0  # k₀ of eq. 2
    boost_max: float = 0.5
    boost_of: str = "gradient"  # or "update": γ is a fraction of the update's norm
    correction: str = "none"  # cosine, agem, pcgrad
    scope: str = "tensor"  # or "global"
    lower: float = 0.0  # bounds of α
    upper: float = 2.0
    lagged: bool = False  # φ of the previous step
    seed_v: bool = False  # v starts at the general gradients' second moment, without bias correction
    anchor: float = 0.0  # c of the pull towards θ₀
    anchor_of: str = "decoupled"  # or "gradient"
    metric: str = "uniform"  # of the pull: uniform (L2-SP), fisher (EWC), root_fisher
    memory: float = 0.0  # λ of eq. 10 in units of the calibration κ: 1 weighs the general loss like the domain's
    memory_form: str = "gradient"  # λHδ before both moments; "momentum": not in v; "implicit": a step of its own
    memory_of: str = "kfac"  # or "diagonal": EWC's metric in the same place
    memory_rank: int = 64
    memory_rest: bool = True  # the isotropic rest of each factor (eq. 12)
    memory_every: int = 1  # steps from one with the anchor, so many times as strong, to the next
    labels: str = "data"  # of the curvature's collection; "sampled": drawn from the model
    shrink: bool = False  # s of eq. 13 on ĝ_G
    refresh: int = 1  # how many times the global gradient is collected in a run
    batches: int = 256  # general batches of the collection
    source: str = "fresh"  # general split of the collection; "base" is what the model was trained on
    topics: str = ""  # comma-separated; empty is all
    storage: str = "fp32"  # of the global gradient: int8, int4, or rank<r>

    def fields(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and the four that name the run."""
        named = ("domain", "method", "lr", "seed")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in named or getattr(self, field.name) != field.default
        }

    def key(self) -> str:
        """Twelve hexadecimal digits that name the run; ``method`` does not enter."""
        fields = {name: value for name, value in self.fields().items() if name != "method"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def training(self) -> Setting:
        """The setting whose trained weights this one evaluates."""
        return dataclasses.replace(self, interpolate=1.0)

    def needs_general(self) -> bool:
        """Whether the run uses statistics of general gradients."""
        statistics = self.anchor > 0 and self.metric != "uniform"
        return self.boost > 0 or self.correction != "none" or self.seed_v or statistics

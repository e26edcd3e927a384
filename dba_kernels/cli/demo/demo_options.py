"""The demo's options, and how much of the work fits in its time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from .training import Speed

SECONDS = 540.0
"""What the default run is planned for: ten minutes, less a tenth for what cannot be foreseen."""

MAX_STEPS = 40

EVALUATION_BLOCKS = 48


@dataclass(frozen=True)
class Options:
    """The command's options; their meaning stands in its ``--help``."""

    model: str | None
    general: str
    domain: str
    global_gradient: Path | None
    steps: int | None
    lr: float
    boost: float
    correction: str
    storage: str
    state_format: str
    batch_size: int
    length: int
    evaluation_blocks: int | None
    seed: int
    out: Path

    def file(self, name: str) -> Path:
        return self.out / name


@dataclass(frozen=True)
class Plan:
    """How much is computed. It follows from the options and ``steps``: the same seed and steps give the same losses."""

    steps: int
    global_batches: int
    evaluation_blocks: int

    @classmethod
    def of(cls, steps: int, options: Options) -> Plan:
        """ĝ_G is averaged over 3/5 as many batches as there are steps; 12 blocks are held out for every 10 steps."""
        batches = 0 if options.global_gradient else max(4, round(0.6 * steps))
        blocks = min(EVALUATION_BLOCKS, max(8, math.ceil(1.2 * steps)))
        return cls(steps, batches, options.evaluation_blocks or blocks)

    @classmethod
    def within(cls, seconds: float, speed: Speed, options: Options) -> Plan:
        """The most steps, up to ``MAX_STEPS``, that are expected to take no longer than ``seconds``; at least 4."""
        plans = (cls.of(steps, options) for steps in range(MAX_STEPS, 3, -1))
        return next((plan for plan in plans if plan.seconds(speed, options) <= seconds), cls.of(4, options))

    def evaluation_batches(self, options: Options) -> int:
        return math.ceil(self.evaluation_blocks / options.batch_size)

    def seconds(self, speed: Speed, options: Options) -> float:
        """Expected wall clock of everything."""
        return self.seconds_before_runs(speed, options) + self.seconds_of_runs(speed, options)

    def seconds_before_runs(self, speed: Speed, options: Options) -> float:
        """The base model's evaluation on two corpora, and the collection."""
        return 2 * self.evaluation_batches(options) * speed.evaluation + self.global_batches * speed.batch

    def seconds_of_runs(self, speed: Speed, options: Options) -> float:
        """Two runs, each evaluated on two corpora."""
        evaluations = 4 * self.evaluation_batches(options) * speed.evaluation
        return evaluations + self.steps * (2 * speed.batch + speed.adamw + speed.dba)

    def revised(self, spent: float, speed: Speed, options: Options) -> Plan:
        """Fewer steps, at least 4, where the part before the runs took ``spent`` seconds, longer than expected.

        Whatever slowed it down is taken to go on. ĝ_G stays as it was collected, so ``--steps`` with what was settled
        on gives the same losses together with ``--global-gradient``.
        """
        slowdown = spent / self.seconds_before_runs(speed, options)
        plans = (replace(self, steps=steps) for steps in range(self.steps, 4, -1))
        fits = (plan for plan in plans if spent + slowdown * plan.seconds_of_runs(speed, options) <= SECONDS)
        return next(fits, replace(self, steps=min(self.steps, 4)))

"""The short runs of ``dba-kernels try``: from one base, with the same domain batches, measured on the same text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient, GlobalGradientCollector, annealing_schedule

from ..held_out import losses_of, weighted
from ..output import InputError
from ..packing import Batch
from ..workload import Workload, count_targets
from .verdict import Point

AL, HALF, REPLAY = "AL", "AL, half the rate", "replay, one to one"
BOOSTED, REMEMBERED = "DBA", "DBA with the memory"


def arms_of(gradient: bool, curvature: bool) -> list[str]:
    """Names of the methods that are run, AL's first."""
    return [AL, HALF, *([BOOSTED] if gradient else []), *([REMEMBERED] if curvature else []), REPLAY]


@dataclass(frozen=True)
class Texts:
    """What one seed trains on and is measured on; ``batches(kind, part)`` gives batches of one size each time anew."""

    batches: Callable[[str], Iterator[Batch]]
    general: Callable[[], Iterator[Batch]]
    held_out: dict[str, list[Batch]]


class Trial:
    """A model, its base weights on the CPU, and the settings that all runs share.

    Args:
        lr, steps: η₀ and T of every run.
    """

    def __init__(self, work: Workload, lr: float, steps: int) -> None:
        self.work, self.lr, self.steps = work, lr, steps
        work.model.eval()  # no dropout: the runs can be compared
        self.notes: dict[str, None] = {}  # what the optimizers warned of, each once
        self.base = {name: value.to("cpu", copy=True) for name, value in work.model.state_dict().items()}

    def collect(self, batches: Iterator[Batch], curvature: int | None, data: str, advance: Callable[[], None]) -> Any:
        """ĝ_G of general text (eq. 1), in int8, and with ``curvature`` the memory."""
        kept: list[Batch] = []
        try:
            collector = GlobalGradientCollector(self.work.model, data=(data,), curvature=curvature)
            with collector:
                for batch in batches:
                    collector.backward(*self.work.loss(batch))
                    kept = [*kept, batch][-8:]
                    advance()
            gradient = collector.finish("int8", None)
            if curvature is not None:
                collector.calibrate(gradient, kept, self.work.loss, None)
        except ValueError as error:
            raise InputError(str(error)) from error
        return gradient

    def measure(self, held_out: dict[str, list[Batch]]) -> Point:
        """Held-out loss of the model as it is on domain and on general text, nats per token."""
        domain, general = (self._loss(held_out[kind]) for kind in ("domain", "general"))
        return domain, general

    def measure_base(self, held_out: dict[str, list[Batch]]) -> Point:
        """The same of the base model, whose weights are put back."""
        self.work.model.load_state_dict(self.base)
        torch.manual_seed(0)
        point = self.measure(held_out)
        if not all(map(math.isfinite, point)):
            raise InputError(f"--model: expected finite held-out losses, got {point[0]} and {point[1]} nats/token")
        return point

    def _loss(self, batches: list[Batch]) -> float:
        counts = [count for batch in batches if (count := count_targets(batch))]
        if not counts:
            raise InputError("data: expected targets in the held-out part, found none; give more text")
        return weighted(losses_of(self.work, batches), counts)[0]

    def run(self, arm: str, texts: Texts, gradient: GlobalGradient, advance: Callable[[], None]) -> Point:
        """Fine-tune from the base by one method; its held-out losses."""
        self.work.model.load_state_dict(self.base)
        lr = self.lr / 2 if arm == HALF else self.lr
        method: dict[str, Any] = {}
        if arm == BOOSTED:
            method = {"global_gradient": gradient, "total_steps": self.steps, "anchor": 0.0}
        elif arm == REMEMBERED:
            method = {"global_gradient": gradient, "total_steps": self.steps}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = DBAAdamW(self.work.model.named_parameters(), lr=lr, weight_decay=0.0, **method)
        self.notes |= {str(warning.message): None for warning in caught}
        schedule = annealing_schedule(optimizer, self.steps)
        general = texts.general() if arm == REPLAY else None
        for batch in islice(texts.batches("domain"), self.steps):
            for part in (batch, next(general)) if general else (batch,):
                loss, count = self.work.loss(part)
                if count:
                    (loss / (2 if general else 1)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()
        del optimizer
        point = self.measure(texts.held_out)
        if not all(map(math.isfinite, point)):
            raise InputError(
                f"--lr: expected a rate at which every method learns, got {self.lr:g}: the held-out losses of {arm!r} "
                f"end at {point[0]} and {point[1]} nats/token; give a smaller one"
            )
        return point

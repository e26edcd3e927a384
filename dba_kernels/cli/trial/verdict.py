"""What short runs say about a global gradient: a difference at equal domain loss, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
"""Held-out loss on domain and on general text, nats per token."""

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantile of Student's t by degrees of freedom; from 11 on, 2.2 is above it."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % interval (Student's t), nats per token."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        t = T_95[n - 1] if n <= len(T_95) else 2.2
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n))

    @property
    def sure(self) -> bool:
        """Whether 0 is outside."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def general_at(domain: float, path: Sequence[Point]) -> float:
    """General loss at a domain loss on AL's path (base, half the learning rate, all of it): linear between its points,
    and where a method learned more of the domain than AL, on along the last stretch. Above the base: the base's."""
    points = sorted(path)
    if domain >= points[-1][0]:
        return points[-1][1]
    pairs = list(pairwise(points))
    (d0, g0), (d1, g1) = next((pair for pair in pairs if domain <= pair[1][0]), pairs[-1])
    return g0 + (g1 - g0) * (domain - d0) / (d1 - d0) if d1 > d0 else g0


def at_equal_domain_loss(reached: Sequence[Point], paths: Sequence[Sequence[Point]]) -> Interval:
    """General loss of a method less AL's at the same domain loss, over seeds."""
    return Interval.of(
        [general - general_at(domain, path) for (domain, general), path in zip(reached, paths, strict=True)]
    )


def in_words(what: str, difference: Interval, learned: Interval, by_al: Interval) -> str:
    """The verdict in a sentence or two.

    Args:
        what: "A global gradient".
        difference: of general loss from AL's at equal domain loss.
        learned, by_al: changes of domain loss from the base model, of the method and of AL.
    """
    if not (by_al.sure and by_al.mean < 0):
        return (
            f"No verdict: AL itself learned nothing of the domain that this budget can show (domain loss {by_al} "
            "nats/token). Give more --tokens, or a larger --lr."
        )
    if learned.mean >= 0:
        return f"{what} harms here: the domain is not learned (domain loss {learned} nats/token, AL {by_al})."
    size, half = abs(difference.mean), difference.half
    if not difference.sure:
        return (
            f"{what} makes no difference that this budget can show: general loss {difference} nats/token against AL's "
            f"at equal domain loss. One above {half + size:.3f} is unlikely; more --tokens or --seeds show smaller."
        )
    if difference.mean < 0:
        return (
            f"{what} helps here: general loss {size:.4f} ± {half:.4f} nats/token lower than AL's at equal domain loss."
        )
    return f"{what} harms here: general loss {size:.4f} ± {half:.4f} nats/token higher than AL's at equal domain loss."

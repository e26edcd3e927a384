"""The one way in which this project compares times: both sides alternate in one run, and the ratio is taken per round.

A machine that slows down for a while slows both sides of a round; the median of the per-round ratios shrugs it off, and
their spread shows it.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Times of two sides, round by round, in seconds."""

    baseline: list[float]
    side: list[float]

    @property
    def ratios(self) -> list[float]:
        """side / baseline of each round, sorted."""
        return sorted(s / b for s, b in zip(self.side, self.baseline, strict=True))

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratio."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high

    @property
    def seconds(self) -> float:
        """Median time of ``side``."""
        return statistics.median(self.side)

    @property
    def baseline_seconds(self) -> float:
        """Median time of ``baseline``."""
        return statistics.median(self.baseline)

    @staticmethod
    def pooled(parts: Iterable[Comparison]) -> Comparison:
        """The rounds of several comparisons as one."""
        parts = list(parts)
        return Comparison([t for p in parts for t in p.baseline], [t for p in parts for t in p.side])

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.seconds * 1e3:9.2f} ms  {self.ratio:7.3f} ({low:.3f} - {high:.3f})"


Clock = Callable[[], float]


def seconds_of(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def compare(
    baseline: Callable[[], object],
    side: Callable[[], object],
    rounds: int = 15,
    warmup: int = 2,
    budget: float = 30.0,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Alternate ``baseline`` and ``side``, swapping who goes first from round to round.

    Args:
        rounds: timed rounds; fewer, but at least 5, once ``budget`` seconds are spent.
        warmup: untimed rounds.
        clock: seconds; ``time.thread_time`` with one thread where the machine is shared.
    """
    for _ in range(warmup):
        baseline()
        side()
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append(seconds_of((baseline, side)[which], clock))
        if i >= 4 and time.perf_counter() - start > budget:
            break
    return Comparison(*times)


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``function`` (of a module) called in a new interpreter: no other measurement's caches, threads or heap."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def machine_load() -> str:
    """What the reader of a table should know about the moment it was measured in."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = "; the machine was busy with other work" if load > 0.5 * cores else ""
    return f"{cores} cores, load average {load:.1f} at the start{busy}"

"""Held-out losses of a run, domain and general text apart: what it learns, and what it forgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .output import InputError
from .packing import Batch
from .workload import Workload, count_targets

KINDS = {"domain": "eval", "general": "general_eval"}
"""Kinds of held-out text, and the prefix of their keys in ``metrics.jsonl``."""


@torch.no_grad()
def losses_of(work: Workload, batches: Sequence[Batch]) -> list[float]:
    """Mean loss per target token of each batch that has targets, in nats; no dropout."""
    work.model.eval()
    return [loss.item() for loss, count in map(work.loss, batches) if count]


def weighted(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """Σ w·x / Σ w, and its standard error over the values (NaN for fewer than two).

    The error is that of a ratio of sums: √(n / (n − 1) · Σ w²(x − x̄)²) / Σ w.
    """
    n, total = len(values), sum(weights)
    mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    squares = math.fsum((w * (x - mean)) ** 2 for w, x in zip(weights, values, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.nan


class HeldOut:
    """Held-out batches, and how their losses change from the first step on.

    Args:
        work: the model that is measured, as it is then.
        batches: by kind, a key of :data:`KINDS`.
        lines: of ``metrics.jsonl``, where the run goes on: the first holds the losses before it.
    """

    def __init__(self, work: Workload, batches: dict[str, list[Batch]], lines: list[dict[str, Any]]) -> None:
        self.work, self.batches = work, batches
        self._before = {kind: lines[0].get(f"{KINDS[kind]}_losses") for kind in batches} if lines else {}

    def measure(self) -> dict[str, Any]:
        """Fields of one line of metrics, for each kind: ``eval_loss``, and from the second time on ``eval_change`` from
        the first and ``eval_change_error``, its standard error over the batches, which both have in common.

        The first time there is ``eval_losses`` in their place: of each batch.

        Raises:
            InputError: batches without a target.
        """
        found: dict[str, Any] = {}
        for kind, batches in self.batches.items():
            prefix, counts = KINDS[kind], [count for batch in batches if (count := count_targets(batch))]
            losses, before = losses_of(self.work, batches), self._before.get(kind)
            if not losses:
                option = f"--{prefix.replace('_', '-')}-data"
                raise InputError(
                    f"{option}: expected targets in the first --eval-batches, found none; give more of them"
                )
            found[f"{prefix}_loss"] = weighted(losses, counts)[0]
            if before is None:
                self._before[kind] = found[f"{prefix}_losses"] = losses
            elif len(before) == len(losses):
                changes = [now - then for now, then in zip(losses, before, strict=True)]
                found[f"{prefix}_change"], found[f"{prefix}_change_error"] = weighted(changes, counts)
        return found


def in_words(line: dict[str, Any]) -> str:
    """The held-out losses of one line of metrics: ``domain 2.9131 (−0.2013), general 3.1002 (+0.0301)``."""
    parts = []
    for kind, prefix in KINDS.items():
        if (loss := line.get(f"{prefix}_loss")) is not None:
            change = line.get(f"{prefix}_change")
            parts.append(f"{kind} {loss:.4f}" + ("" if change is None else f" ({change:+.4f})"))
    return ", ".join(parts)


def before_and_after(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    """Kind, a sentence about it, loss before and after, of every kind that a run has measured."""
    for kind, prefix in KINDS.items():
        measured = [line for line in lines if line.get(f"{prefix}_loss") is not None]
        if not measured:
            continue
        before, after = (line[f"{prefix}_loss"] for line in (measured[0], measured[-1]))
        change, error = (measured[-1].get(f"{prefix}_{part}") for part in ("change", "change_error"))
        words = f"held-out loss of {kind} text: {before:.4f} before, {after:.4f} after"
        if change is not None and error is not None:
            words += f"; {change:+.4f} ± {error:.4f} nats/token: {_meaning(kind, change, error)}"
        yield kind, words, before, after


def _meaning(kind: str, change: float, error: float) -> str:
    if abs(change) < 2 * error:
        return "no change beyond the noise"
    return ("learned" if kind == "domain" else "nothing forgotten") if change < 0 else "forgotten"

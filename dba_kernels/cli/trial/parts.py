"""A corpus in parts that share no document, and how much of everything a token budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..conversations import Document
from ..output import InputError
from ..text import Corpus

FEWEST_STEPS, FEWEST_BATCHES = 8, 4
TRAINING, COLLECTING = 0.7, 0.15
"""Shares of the token budget; the rest is for evaluation, where a token costs a third: there is no backward pass."""


class Part(Corpus):
    """Some documents of a corpus, in the corpus' numbering of them."""

    def __init__(self, whole: Corpus, indices: Sequence[int]) -> None:
        self.whole, self.indices, self.names, self.field = whole, indices, whole.names, whole.field

    def __len__(self) -> int:
        return len(self.indices)

    def document(self, index: int) -> Document:
        return self.whole.document(self.indices[index])

    def where(self, index: int) -> str:
        return self.whole.where(self.indices[index])


def split(whole: Corpus, seeds: int, seed: int, option: str) -> tuple[list[Part], list[Part]]:
    """For each of ``seeds`` runs a part to train on and one held out, a fifth of it; no document is in two parts.

    Raises:
        InputError: there are fewer than two documents a run.
    """
    if len(whole) < 2 * seeds:
        raise InputError(
            f"{option}: expected at least {2 * seeds} documents, 2 for each of {seeds} runs, got {len(whole)}; give "
            "more text, cut into records, or fewer --seeds"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    shares = [order[run::seeds] for run in range(seeds)]
    kept = [max(1, len(share) // 5) for share in shares]
    train = [Part(whole, share[n:]) for share, n in zip(shares, kept, strict=True)]
    return train, [Part(whole, share[:n]) for share, n in zip(shares, kept, strict=True)]


@dataclass(frozen=True)
class Budget:
    """What is computed: steps of each run, batches of the collection, batches held out per corpus and run."""

    steps: int
    collected: int
    held_out: int

    @classmethod
    def of(cls, tokens: int, per_batch: int, arms: int, seeds: int, collects: bool) -> Budget:
        """
        Args:
            tokens: to be read in all.
            per_batch: tokens of a batch.
            arms: runs per seed.

        Raises:
            InputError: too few for ``FEWEST_STEPS`` steps each.
        """
        steps = int(TRAINING * tokens / (arms * seeds * per_batch))
        if steps < FEWEST_STEPS:
            needed = -(-FEWEST_STEPS * arms * seeds * per_batch * 10 // 7)
            raise InputError(
                f"--tokens: expected at least {needed:,} for {arms} runs x {seeds} seeds of {FEWEST_STEPS} steps of "
                f"{per_batch:,} tokens, got {tokens:,}; give more, or a smaller --batch, --length or --seeds"
            )
        measured = 2 * seeds * (arms + 1)
        held_out = int(3 * (1 - TRAINING - COLLECTING) * tokens / (measured * per_batch))
        collected = max(FEWEST_BATCHES, int(COLLECTING * tokens / per_batch)) if collects else 0
        return cls(steps, collected, min(max(held_out, 2), 64))

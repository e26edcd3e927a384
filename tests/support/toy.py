"""A small model that is awkward to collect from, and batches of different sizes for it."""

from __future__ import annotations

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


class Toy(nn.Module):
    """Tied, frozen and sometimes unused parameters, dropout, and a buffer that training mode would move."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 96)
        self.hidden = nn.Linear(96, 96)
        self.norm = nn.BatchNorm1d(96)
        self.frozen = nn.Linear(96, 96)
        self.sometimes = nn.Linear(96, 96, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.norm(self.hidden(self.dropout(self.embed(ids)))).tanh())
        if len(ids) % 2:
            x = x + self.sometimes(x)
        return self.head(x)


def token_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    ids, targets = batch
    return nn.functional.cross_entropy(model(ids), targets), len(targets)


def batches_of(count: int = 8, seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    sizes = [3 + 5 * i % 11 for i in range(count)]
    return [(torch.randint(0, 50, (n,), generator=g), torch.randint(0, 50, (n,), generator=g)) for n in sizes]

"""Low-rank adapters (LoRA, Hu et al. 2021) on every linear layer of the blocks; the embedding stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """``W x + (2/√r)·B A x``: W frozen, A ``[r, in]`` random, B ``[out, r]`` zero (the rank-stabilised scale)."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = 2 / rank**0.5
        draw = torch.randn(rank, linear.in_features, generator=generator)
        self.a = nn.Parameter(draw / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.a.T) @ self.b.T * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer with the adapter added to its weight."""
        self.linear.weight += self.scale * self.b @ self.a
        return self.linear.requires_grad_(True)


def _replace(model: nn.Module, kind: type[nn.Module], make: object) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))  # type: ignore[operator]


def attach(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze ``model`` and give each linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        _replace(block, nn.Linear, lambda linear: LoRALinear(linear, rank, generator))


def merge(model: nn.Module) -> None:
    """Fold the adapters into the weights: the model has its original names again."""
    _replace(model, LoRALinear, LoRALinear.merged)
    model.requires_grad_(True)

"""A small model with every kind of linear map, and batches with padding and prompts for it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

WORDS, WIDTH, IGNORED = 19, 12, -100
Batch = tuple[torch.Tensor, torch.Tensor]


class Tiny(nn.Module):
    """Tied embedding and head, a transposed map, a frozen one, a norm, and stacked experts; ``seen`` keeps what each
    map took and gave."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH + 3)
        self.frozen = nn.Linear(WIDTH + 3, WIDTH + 3).requires_grad_(False)
        self.down = Conv1D(WIDTH, WIDTH + 3)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.3)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self.seen[name] = inputs, output
        return output

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.keep("embed", ids, self.embed(ids))
        x = x.cumsum(dim=1) / (1 + torch.arange(ids.shape[1])).to(x.dtype).unsqueeze(1)  # causal
        inner = self.frozen(self.keep("up", x, self.up(x))).tanh()
        x = self.norm(x + self.keep("down", inner, self.down(inner)))
        x = x + torch.einsum("bti,eij->btj", x, self.experts).tanh()
        return self.keep("head", x, self.head(x))


def batches_of(count: int = 4) -> list[Batch]:
    """Rows of eight tokens, the last of each row padding, and prompts that are not targets."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, WORDS, (3, 8), generator=generator)
        labels = torch.randint(0, WORDS, (3, 8), generator=generator)
        labels[0, 6:] = labels[1, 7:] = labels[2, :2] = IGNORED
        batches.append((ids, labels))
    return batches


def loss_of(model: Tiny, batch: Batch) -> tuple[torch.Tensor, int]:
    logits = model(batch[0]).flatten(0, 1).to(torch.promote_types(model.norm.weight.dtype, torch.float32))
    return cross_entropy(logits, batch[1].flatten(), ignore_index=IGNORED), int((batch[1] != IGNORED).sum())


def copy_of(model: Tiny) -> Tiny:
    """A copy with weights of its own."""
    model.seen = {}  # not leaves: they cannot be copied
    return copy.deepcopy(model)

"""A small Llama, real text for it (the licence, byte by byte), its global gradient, and the plain loop over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaForCausalLM, get_scheduler

from bench.models import llama
from dba_kernels import GlobalGradient, collect_global_gradient

TEXT = (Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()
LENGTH = 16

Batch = dict[str, torch.Tensor]


def make_model(dtype: torch.dtype = torch.float32, vocab_size: int = 256) -> LlamaForCausalLM:
    """The same weights at every call, in either dtype (to its rounding)."""
    torch.manual_seed(0)
    return llama(vocab_size=vocab_size).to(dtype)


def examples(count: int, start: int = 0) -> list[Batch]:
    """``input_ids`` and ``labels`` ``[LENGTH]`` each, as a data set; every third has its first half masked."""
    found = []
    for i in range(start, start + count):
        ids = torch.tensor(list(TEXT[i * LENGTH : (i + 1) * LENGTH]))
        labels = ids.clone()
        if i % 3 == 0:
            labels[: LENGTH // 2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def batches(items: Sequence[Batch], size: int) -> list[Batch]:
    """Stacked in their order."""
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    return [{key: torch.stack([item[key] for item in chunk]) for key in chunk[0]} for chunk in chunks]


def make_global(model: torch.nn.Module | None = None, format: str = "int8") -> GlobalGradient:
    """Collected on text that no test trains on."""
    return collect_global_gradient(model or make_model(), batches(examples(8, start=400), 2), format=format)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The Trainer's rule, said in another way: here exactly the matrices decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in named if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if p.dim() != 2], "weight_decay": 0.0},
    ]


def plain_loop(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Sequence[Batch]],
    total_steps: int,
    max_grad_norm: float | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> list[float]:
    """One optimizer step per element of ``steps``: micro-batches, whose target tokens count alike. Losses."""
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=total_steps)
    losses = []
    model.train()
    for micro_batches in steps:
        tokens = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with autocast():
                loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        if max_grad_norm is not None:
            clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector, float64."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def difference(got: torch.nn.Module, expected: torch.nn.Module, start: torch.nn.Module) -> float:
    """‖θ − θ'‖ / ‖θ' − θ₀‖: how far two runs are apart, in units of how far one went."""
    moved = weights(expected) - weights(start)
    assert moved.norm() > 0
    return ((weights(got) - weights(expected)).norm() / moved.norm()).item()

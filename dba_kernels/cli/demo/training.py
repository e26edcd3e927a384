"""What the demo does with a model: measure its loss, fine-tune it, and find out how much of that fits in the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dba_kernels import DBAAdamW, annealing_schedule

from ..devices import autocast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Advance = Callable[[], None]
"""Called after each batch: moves a progress bar."""


def autocast(device: torch.device) -> torch.autocast:
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of a batch of token ids ``[batch, length]``, a scalar."""
    with autocast(ids.device):
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int, advance: Advance) -> torch.Tensor:
    """Mean next-token loss of each block of ``[n, length]`` token ids: fp32 ``[n]``, on the CPU."""
    losses = []
    for ids in blocks.to(model.device).split(batch_size):
        with autocast(ids.device):
            logits = model(input_ids=ids).logits[:, :-1]
        token_losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(token_losses.mean(1).cpu())
        advance()
    return torch.cat(losses)


@dataclass
class Run:
    """One fine-tuning run.

    Args:
        losses: training loss of each step.
        metrics: ``DBAAdamW.metrics()`` of each step; empty for other optimizers.
        seconds: wall clock of the steps, evaluation not included.
        optimizer_seconds: the part of it spent in ``optimizer.step()``.
        bytes_per_parameter: weights, gradients, optimizer state and ĝ_G after the last step.
    """

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    bytes_per_parameter: float = 0.0


def fine_tune(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    advance: Advance,
    stored_bytes: int = 0,
) -> Run:
    """One step per batch of ids ``[batch, length]``, learning rate falling linearly to 0 over ``steps`` (eq. 6).

    Args:
        stored_bytes: bytes of ĝ_G, to be counted with the optimizer's own.
    """
    run = Run()
    schedule = annealing_schedule(optimizer, total_steps=steps)
    started = time.perf_counter()
    for ids in batches:
        loss = loss_of(model, ids.to(model.device))
        loss.backward()
        run.losses.append(loss.item())
        stepping = time.perf_counter()
        optimizer.step()
        run.optimizer_seconds += time.perf_counter() - stepping
        schedule.step()
        if isinstance(optimizer, DBAAdamW):
            run.metrics.append(optimizer.metrics())
        run.bytes_per_parameter = run.bytes_per_parameter or _bytes_per_parameter(optimizer, stored_bytes)
        optimizer.zero_grad()
        advance()
    run.seconds = time.perf_counter() - started
    return run


def _bytes_per_parameter(optimizer: torch.optim.Optimizer, stored_bytes: int) -> float:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(p.grad for p in params if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held: int = sum(t.nbytes for t in tensors) + stored_bytes
    return held / sum(int(p.numel()) for p in params)


@dataclass(frozen=True)
class Speed:
    """Seconds that one training batch, one evaluation batch and one optimizer step of either kind take."""

    batch: float
    evaluation: float
    adamw: float
    dba: float


def measure_speed(model: PreTrainedModel, ids: torch.Tensor, evaluation_ids: torch.Tensor) -> Speed:
    """Time each on this machine, the first call of each not counted. Leaves weights and gradients as they were."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def train() -> None:
        loss_of(model, ids.to(model.device)).backward()
        torch.cuda.synchronize() if model.device.type == "cuda" else None

    batch = seconds(train)
    # At rate 0 a step moves no weight: θ·(1 − 0·λ) − 0·update.
    adamw = seconds(torch.optim.AdamW(model.parameters(), lr=0.0, fused=True).step)
    dba = seconds(DBAAdamW(model.named_parameters(), lr=0.0).step)
    model.zero_grad()
    return Speed(batch, seconds(lambda: evaluate(model, evaluation_ids, len(evaluation_ids), lambda: None)), adamw, dba)

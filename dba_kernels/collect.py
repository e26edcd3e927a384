"""Stage 1: training at learning rate zero on general data. Weights never move; gradients are summed, divided once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .batches import LossFunction, loss_and_tokens, sampled_label_loss
from .calibration import keeping
from .collector import GlobalGradientCollector
from .curvature_records import check_kept
from .distributed import together_in
from .formats import check_iterable, check_type
from .global_gradient import GlobalGradient, save_or_hand_over
from .identity import describe_function
from .records import check_rank

__all__ = ["GlobalGradientCollector", "collect_global_gradient", "keeping", "sampled_label_loss"]


def collect_global_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    format: str | None = "int8",
    rank: int | None = None,
    *,
    weighting: str = "tokens",
    data: str | Iterable[str] = (),
    autocast_dtype: torch.dtype | None = None,
    snapshot_path: str | os.PathLike[str] | None = None,
    snapshot_every: int = 100,
    group: dist.ProcessGroup | None = None,
    save_to: str | os.PathLike[str] | None = None,
    curvature: int | None = None,
) -> GlobalGradient:
    """ĝ_G = Σ_i w_i g_i / Σ_i w_i over the micro-batches (eq. 1), compressed.

    Dropout is off, weights and buffers are left as they are. See :class:`GlobalGradientCollector` for memory, dropped
    batches and snapshots.

    Args:
        model: the base model; parameters that do not require gradients are left out.
        batches: any iterable of micro-batches; an interrupted collection must see the same ones again.
        loss_fn: ``loss_fn(model, batch)`` → the batch's mean loss, or (mean loss, number of target tokens). None for
            Hugging Face models: the batch is a mapping with ``labels``, the loss is the output's.
            :func:`sampled_label_loss`: the curvature of labels that the model draws itself.
        format, rank: of the stored gradient, see :meth:`GlobalGradient.from_tensors`. ``format=None`` keeps the
            curvature alone.
        weighting: ``"tokens"``: w_i is the number of target tokens, so ĝ_G is the gradient of the mean loss per token
            over all the data (a loss function that gives no number: w_i = 1). ``"batch"``: w_i = 1.
        data: names of the data, recorded in the file.
        autocast_dtype: run forward passes under ``torch.autocast`` of this dtype.
        snapshot_path: keep the sums here; where this file exists, the collection goes on from it. Processes that hold
            whole models need a path each.
        snapshot_every: micro-batches between snapshots.
        group: process group whose ranks each collected a part of the data, for example
            ``torch.distributed.group.WORLD``. None: this process has all of it, or the model is sharded.
        save_to: write the result to this ``.safetensors`` file and return it mapped from there; needed for a model
            sharded by FSDP2, where one rank writes and all return what it wrote.
        curvature: r, also collect the second order of the general loss (METHOD's eqs. 11, 12) in factors of this rank,
            which ``DBAAdamW(anchor=…)`` holds the weights by. Every batch must say its number of target tokens.

    Raises:
        ValueError: a bad argument, batches without labels, or no batch with a finite loss.
        RuntimeError: the weights changed meanwhile.

    Example:
        >>> model = nn.Linear(8, 1)
        >>> batches = [torch.randn(4, 8) for _ in range(3)]
        >>> gg = collect_global_gradient(model, batches, lambda model, x: model(x).square().mean())
        >>> sorted(gg), gg.provenance.batches
        (['bias', 'weight'], 3)
    """
    _check_arguments(model, batches, loss_fn, autocast_dtype, format, curvature, rank)
    settings = {"loss function": describe_function(loss_fn), "autocast dtype": str(autocast_dtype)}
    options: dict[str, Any] = {"snapshot_path": snapshot_path, "snapshot_every": snapshot_every, "settings": settings}
    options |= {"weighting": weighting, "data": data, "curvature": curvature}
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    collector = together_in(group, device, lambda: _prepared(model, save_to, options))
    kept: list[Any] = []
    loss_of = functools.partial(_loss_of, model, loss_fn, autocast_dtype)
    with collector:
        for batch in collector.remaining(keeping(batches, kept)):
            with torch.enable_grad():
                loss, tokens = loss_of(batch)
            collector.backward(loss, tokens)
    if group is not None:
        collector.reduce(group)
    if curvature is None:
        return collector.finish(format, rank, save_to=save_to)
    found = collector.finish(format, rank)
    collector.calibrate(found, kept, loss_of, group)
    if save_to is None:
        return found
    save_or_hand_over(found, save_to)
    return GlobalGradient.load(save_to)


def _check_arguments(
    model: Any, batches: Any, loss_fn: Any, autocast_dtype: Any, format: Any, curvature: Any, rank: Any
) -> None:
    """Before the long part."""
    check_kept(format, curvature)
    check_type("model", model, nn.Module)
    check_iterable("batches", batches, "micro-batches")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function of model and batch, got {type(loss_fn).__name__}")
    if autocast_dtype is not None:
        check_type("autocast_dtype", autocast_dtype, torch.dtype)
    if rank is not None:
        check_rank(rank, {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad})


def _prepared(
    model: nn.Module, save_to: str | os.PathLike[str] | None, options: dict[str, Any]
) -> GlobalGradientCollector:
    """Everything that can be refused before the long part has been."""
    collector = GlobalGradientCollector(model, **options)
    collector.check_destination(save_to)
    return collector


def _loss_of(
    model: nn.Module, loss_fn: LossFunction | None, autocast_dtype: torch.dtype | None, batch: Any
) -> tuple[torch.Tensor, Any]:
    if autocast_dtype is None:
        return loss_and_tokens(model, batch, loss_fn)
    with torch.autocast(next(iter(model.parameters())).device.type, dtype=autocast_dtype):
        return loss_and_tokens(model, batch, loss_fn)

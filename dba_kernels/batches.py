"""What the collector needs to know of a micro-batch: its loss and its number of target tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

LossFunction = Callable[[nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, int | torch.Tensor]"]

IGNORED_LABEL = -100
"""The label at which Hugging Face models predict nothing."""


def loss_and_tokens(
    model: nn.Module, batch: Any, loss_fn: LossFunction | None
) -> tuple[torch.Tensor, int | torch.Tensor | None]:
    """The micro-batch's mean loss and its number of target tokens (None if ``loss_fn`` does not say).

    Args:
        loss_fn: None for Hugging Face models, which are called with the batch's entries, moved to their device.

    Raises:
        ValueError: without ``loss_fn``, a batch without labels or an output without a loss.
    """
    if loss_fn is not None:
        result = loss_fn(model, batch)
        return result if isinstance(result, tuple) else (result, None)
    if not isinstance(batch, Mapping) or "labels" not in batch:
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batch: expected a mapping with input_ids and labels ({IGNORED_LABEL} where there is nothing to predict), "
            f"got {got}; add labels, or give loss_fn"
        )
    device = next(iter(model.parameters())).device
    output = model(**{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()})
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"model: expected an output with a loss, got {type(output).__name__}; give loss_fn")
    return loss, target_tokens(model, batch["labels"])


def target_tokens(model: nn.Module, labels: torch.Tensor) -> int:
    """Labels that enter the mean loss of a Hugging Face model; decoders never predict the first."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    kind = getattr(model, "loss_type", None)
    if labels.dim() > 1 and not encoder_decoder and kind in (None, "ForCausalLM", "ForConditionalGeneration"):
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())

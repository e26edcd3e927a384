"""What the collector needs to know of a micro-batch: its loss and its number of target tokens."""

from __future__ import annotations

import hashlib
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


def sampled_label_loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    """The loss on labels that the model draws itself: a ``loss_fn`` of ``collect_global_gradient`` for curvature alone.

    E[d dᵀ] over them is the true Fisher matrix, over the data's own labels the empirical one. ĝ_G of such labels is
    noise around 0: collect with ``format=None``. In our study both protect alike (``bench/quality/README.md``), and
    this one takes a second forward pass. The draw depends on the batch's ``input_ids`` alone, so that a resumed
    collection draws the same.

    Args:
        model: a Hugging Face decoder: its logits at a position are of the next token.
        batch: a mapping with ``input_ids`` ``[rows, length]`` int64; ``labels`` say where something is predicted (−100:
            nothing), everywhere without them.

    Returns:
        The mean loss (nats) and the number of labels that were drawn.

    Raises:
        ValueError: a batch without ``input_ids``, or a model that is no decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> loss, tokens = sampled_label_loss(model, {"input_ids": torch.arange(8)[None]})
        >>> tokens
        7
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch: expected a mapping with input_ids, got {got}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder, got an encoder-decoder; its labels are its inputs too")
    device = next(iter(model.parameters())).device
    inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items() if key != "labels"}
    with torch.no_grad():
        likely = model(**inputs).logits[..., :-1, :].float().softmax(-1).cumsum(-1)
    seed = hashlib.sha256(batch["input_ids"].cpu().contiguous().numpy().tobytes()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
    drawn = torch.rand(likely.shape[:-1], generator=generator).to(device)
    labels = batch.get("labels", batch["input_ids"]).to(device).clone()
    chosen = (likely < drawn.unsqueeze(-1) * likely[..., -1:]).sum(-1).to(labels.dtype)
    labels[..., 1:] = torch.where(labels[..., 1:] == IGNORED_LABEL, labels[..., 1:], chosen)
    return model(**inputs, labels=labels).loss, target_tokens(model, labels)


def target_tokens(model: nn.Module, labels: torch.Tensor) -> int:
    """Labels that enter the mean loss of a Hugging Face model; decoders never predict the first."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    kind = getattr(model, "loss_type", None)
    if labels.dim() > 1 and not encoder_decoder and kind in (None, "ForCausalLM", "ForConditionalGeneration"):
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())

"""What a parameter group must hold, whoever wrote it: the constructor, a group of its own, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_hyperparameters(index: int, saved: Mapping[str, Any]) -> None:
    """Refuse a saved group of another kind of optimizer.

    Raises:
        ValueError: it lacks what AdamW's groups hold.
    """
    if missing := [key for key in ("lr", "betas", "eps", "weight_decay") if key not in saved]:
        raise ValueError(
            f"param_groups[{index}]: expected AdamW's hyperparameters, got no {missing[0]!r}; the state was saved by "
            "another kind of optimizer: begin with a fresh one"
        )


def check_group(group: dict[str, Any]) -> None:
    """Refuse what no kernel here does, in the constructor, a group of its own or a loaded state dict alike."""
    lr, betas = group["lr"], group["betas"]
    if torch.is_tensor(lr) and lr.numel() != 1:
        raise ValueError(f"lr: expected a number or a tensor of one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name}: expected a number >= 0, got {group[name]}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")
    if group["amsgrad"]:
        raise ValueError("amsgrad: expected False; it needs a third state tensor, which no kernel here updates")
    if group["differentiable"]:
        raise ValueError("differentiable: expected False; the fused step does not record gradients")
    if not group["decoupled_weight_decay"]:
        raise ValueError("decoupled_weight_decay: expected True (AdamW), got False (Adam)")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach, fused: expected at most one of them True, as in torch")

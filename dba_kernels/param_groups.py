"""What a parameter group must hold, whoever wrote it: the constructor, a group of its own, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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

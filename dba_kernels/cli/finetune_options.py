"""The options of ``dba-kernels finetune``, and which of them decide the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dba_kernels import GlobalGradient

from .options import DataOptions

NOT_SETTINGS = (
    *("out", "resume", "eval_data", "general_eval_data", "eval_every", "eval_batches", "save_every", "device"),
    *("global_gradient", "gradient_checkpointing"),
)
"""Options that do not change the weights; of the global gradient, its digest counts."""


@dataclass(frozen=True)
class Options(DataOptions):
    """The command's options; their meaning stands in its ``--help``."""

    model: str
    data: tuple[str, ...]
    global_gradient: Path | None
    out: Path
    steps: int
    lr: float
    warmup: int
    weight_decay: float
    max_grad_norm: float | None
    batch: int
    micro_batch: int | None
    boost: str
    boost_max: float
    correction: str
    anchor: str
    anchor_every: int
    state_format: str
    param_format: str
    gradient_checkpointing: bool
    eval_data: tuple[str, ...]
    general_eval_data: tuple[str, ...]
    eval_every: int
    eval_batches: int
    save_every: int
    resume: bool


def settings_of(options: Options, gradient: GlobalGradient | None) -> dict[str, Any]:
    """What the weights depend on, in JSON's types."""
    chosen = {k: v for k, v in asdict(options).items() if k not in NOT_SETTINGS}
    chosen["data"] = list(options.data)
    return chosen | {"global_gradient": None if gradient is None else gradient.digest}

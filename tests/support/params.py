"""Four parameters of shapes that differ in kind, their gradients, a global gradient, and the loop over them."""

from __future__ import annotations

import torch

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.global_gradient import fingerprint

SHAPES = {"embed.weight": (70, 65), "norm.weight": (65,), "head.weight": (64, 64), "tiny.weight": (8, 8)}
COMPRESSED = "head.weight"


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradient(name: str, step: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return (scale * torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)).to(dtype)


def make_global(params: dict[str, torch.nn.Parameter] | None = None, format: str = "int8") -> GlobalGradient:
    tensors = {name: gradient(name, 999_999, torch.float32) for name in SHAPES}
    return GlobalGradient.from_tensors(tensors, format, fingerprint=fingerprint(params.items()) if params else None)


def dba(params: dict[str, torch.nn.Parameter], **kwargs) -> DBAAdamW:
    """A DBA optimizer on the reference backend, in the regime of the method."""
    defaults = dict(lr=1e-5, global_gradient=make_global(params), total_steps=1000, boost="paper", backend="reference")
    return DBAAdamW(params.items(), **(defaults | kwargs))


def train(params: dict, optimizer: torch.optim.Optimizer, steps: range, scheduler=None) -> None:
    for step in steps:
        for name, param in params.items():
            missing = name == "norm.weight" and step % 3 == 0
            param.grad = None if missing else gradient(name, step, param.dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

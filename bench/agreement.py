"""DBAAdamW on the Triton backend trains like the reference, in every format combination of the variant list.

    python -m bench.agreement              # 50 steps each; in the interpreter if there is no GPU, minutes

Per combination: ‖Δθ − Δθ_ref‖ / ‖Δθ_ref‖ after boost, correction, clipping and moments, from the same start on the same
gradients, with θ the value that weight and remainder stand for. The last row is the negative control: β₁ off by 0.1.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl
from rich.console import Console
from rich.table import Table

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.reference.remainder import join

from .variants import VARIANTS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"head.weight": (64, 64), "norm.weight": (96,)}
DTYPES = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
LIMITS = {"split8": 1e-2, "int8": 1e-3, "bf16": 1e-3}
"""By the coarsest rounding that a difference of one fp32 ulp may push the other way; else 1e-5."""
NATIVE_LIMIT = 5e-2
"""Weights without remainder move by whole ulps of bf16: one that rounds the other way is a visible share of all."""

Formats = tuple[torch.dtype, str, str, str]


def combinations() -> list[Formats]:
    """(parameter dtype, parameter format, state format, format of ĝ_G) of every step variant."""
    constants = [variant.constants for variant in VARIANTS if variant.name.startswith("step")]
    found = [(DTYPES[c["PARAM_DTYPE"]], c["PARAM_FORMAT"], c["STATE_FORMAT"], c["GLOBAL_FORMAT"]) for c in constants]
    return list(dict.fromkeys(found))


def gradient(name: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + len(name))
    return (torch.randn(SHAPES[name], generator=generator) * 1e-2).to(DEVICE, dtype)


def displacement(formats: Formats, backend: str, steps: int, beta1: float = 0.9) -> torch.Tensor:
    """Δθ of all parameters, float64."""
    dtype, param_format, state_format, stored = formats
    generator = torch.Generator().manual_seed(0)
    params = {
        n: torch.nn.Parameter((torch.randn(s, generator=generator) * 0.05).to(DEVICE, dtype)) for n, s in SHAPES.items()
    }
    start = torch.cat([p.detach().double().flatten() for p in params.values()])
    options: dict = {"state_format": state_format, "param_format": param_format, "backend": backend}
    if stored != "none":
        gg = GlobalGradient.from_tensors({n: gradient(n, 999, torch.float32) for n in SHAPES}, format=stored)
        options |= {"global_gradient": gg, "total_steps": 400, "boost": "paper", "max_grad_norm": 0.5}
    optimizer = DBAAdamW(params.items(), lr=1e-4, betas=(beta1, 0.99), **options)
    for step in range(steps):
        for name, param in params.items():
            param.grad = gradient(name, step, dtype) + 0.5 * gradient(name, 998, dtype)
        optimizer.step()
    return torch.cat([_joined(optimizer, p).double().flatten() for p in params.values()]) - start


def _joined(optimizer: DBAAdamW, param: torch.nn.Parameter) -> torch.Tensor:
    state = optimizer.state[param]
    if "remainder" not in state:
        return param.detach()
    return join(param.detach(), state["remainder"], optimizer.options.param_format)


def limit_of(formats: Formats) -> float:
    dtype, param_format, state_format, _ = formats
    if param_format == "native" and dtype != torch.float32:
        return NATIVE_LIMIT
    return max(LIMITS.get(param_format, 1e-5), LIMITS.get(state_format, 1e-5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", message="lr: ")  # large, so that 50 steps move even weights without remainder
    table = Table("parameter", "format", "state", "ĝ_G", "error", "limit", title=f"{steps} steps against the reference")
    failures = 0
    for formats in combinations():
        expected = displacement(formats, "reference", steps)
        error = float((displacement(formats, "triton", steps) - expected).norm() / expected.norm())
        failures += error > limit_of(formats)
        table.add_row(str(formats[0]), *formats[1:], f"{error:.1e}", f"{limit_of(formats):.0e}")
        print(formats, f"{error:.1e}", file=sys.stderr, flush=True)
    right, wrong = (displacement(combinations()[0], "reference", steps, beta1) for beta1 in (0.9, 0.8))
    control = float((wrong - right).norm() / right.norm())
    failures += control < max(LIMITS.values())
    table.add_row("negative control", "", "", "", f"{control:.1e}", f"> {max(LIMITS.values()):.0e}")
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""``DBAAdamW`` end to end: twenty steps in every combination of formats, all modes, low rank, the same bits twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.agreement import combinations, displacement, limit_of
from dba_kernels import DBAAdamW, GlobalGradient

from .device import DEVICE, SIMULATED, generator

if TYPE_CHECKING:
    from .report import Report

STEPS = 3 if SIMULATED else 20
CONTROL = 1e-2
"""What the displacement must differ by at least where β₁ is off by 0.1."""
SHAPES = {"a.weight": (64, 64), "b.weight": (5, 77), "norm.weight": (96,), "empty.weight": (0, 8)}
MODES: dict[str, dict[str, Any]] = {
    "global scope": {"correction_scope": "global"},
    "no correction": {"correction": "none"},
    "agem": {"correction": "agem"},
    "pcgrad": {"correction": "pcgrad"},
    "clipped": {"max_grad_norm": 1e-2},
    "functions": {
        "boost": lambda t, total: 0.2 * (1 - t / total),
        "correction": lambda d, g, s: 1 - d / (g * s).sqrt(),
    },
    "low rank": {"rank": 8},
}
LIMIT = 1e-4
"""‖Δθ − Δθ_ref‖ / ‖Δθ_ref‖ of fp32 parameters and state over twenty steps; the coarser formats have limits of their own
in ``bench.agreement``. Low rank: its factors are multiplied in bf16 on a GPU, by design."""
LOW_RANK_LIMIT = 2e-2


def check_formats(formats: Any) -> dict[str, float]:
    want = displacement(formats, "reference", STEPS)
    got = displacement(formats, "triton", STEPS)
    error, limit = float((got - want).norm() / want.norm()), limit_of(formats)
    assert error <= limit, f"the displacement of {STEPS} steps is off by {error:.2e}, at most {limit:.0e} allowed"
    return {"error": error, "limit": limit}


def check_control() -> None:
    """Negative control: another β₁ must be noticed."""
    right, wrong = (displacement(combinations()[0], "reference", STEPS, beta1) for beta1 in (0.9, 0.8))
    error = float((wrong - right).norm() / right.norm())
    assert error > CONTROL, f"beta1 off by 0.1 moves the weights by {error:.1e} only: the comparison notices nothing"


def train(backend: str, steps: int, **options: Any) -> torch.Tensor:
    """All weights after some steps whose gradients come and go, one step not finite, under a loss scale."""
    rank = options.pop("rank", None)
    draw = generator(0)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE) * scale

    params = {name: torch.nn.Parameter(normal(shape, 0.05)) for name, shape in SHAPES.items()}
    stored = {name: normal(shape, 1e-2) for name, shape in SHAPES.items()}
    gg = GlobalGradient.from_tensors(stored, format="fp32", rank=rank)
    start = {name: param.detach().clone() for name, param in params.items()}
    options = {"boost": "paper", "lr": 1e-4, "total_steps": 100, "backend": backend} | options
    optimizer = DBAAdamW(params.items(), global_gradient=gg, **options)
    for step in range(steps):
        optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)
        optimizer.found_inf = torch.full((), float(step == 2), device=DEVICE)
        for k, (name, param) in enumerate(params.items()):
            param.grad = None if (step + k) % 4 == 3 else 8.0 * (normal(SHAPES[name], 1e-2) + 0.3 * stored[name])
        optimizer.step()
    return torch.cat([(param.detach() - start[name]).double().flatten() for name, param in params.items()])


def check_mode(options: dict[str, Any], limit: float) -> dict[str, float]:
    want, got = (train(backend, STEPS + 2, **options) for backend in ("reference", "triton"))
    error = float((got - want).norm() / want.norm())
    assert error <= limit, f"the displacement is off by {error:.2e}, at most {limit:.0e} allowed"
    return {"error": error, "limit": limit}


def check_same_bits() -> None:
    runs = [train("triton", STEPS + 2, max_grad_norm=0.1) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]), "three runs gave different bits"


def run(report: Report) -> None:
    report.attempt("control beta1", check_control)
    report.attempt("three runs, the same bits", check_same_bits)
    for name, options in MODES.items():
        report.attempt(name, check_mode, options, LOW_RANK_LIMIT if "rank" in options else LIMIT)
    everything = combinations()
    for formats in everything[1::5] if SIMULATED else everything:
        report.attempt(f"{STEPS} steps, {formats}", check_formats, formats)

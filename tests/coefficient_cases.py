"""Inputs, settings and comparison of ``coefficients``: for tests, and for machines without pytest."""

from __future__ import annotations

import dataclasses

import torch

from dba_kernels.reference import coefficients as reference
from dba_kernels.stepdata import CORRECTIONS, Coefficient, Hyper, StepOverrides, StepSettings, StepTables, Summary

from .tolerances import TOLERANCES

N, GROUPS, ACTIVE = 7, 3, [5, 0, 3, 6, 2]
BASE = StepSettings(
    boost=0.3,
    total_steps=30,
    boost_max=0.7,
    correction="cosine",
    scope="tensor",
    bounds=(0.1, 1.7),
    max_grad_norm=0.37,
    reduce=True,
)
OUTPUTS = ("steps", "bias_corrections", "counters", "table", "report", "summary")


def arguments(seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of ``coefficients``: 7 parameters in 3 groups, 5 of them active, one without a global gradient."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    grad_sq, global_sq = uniform(N) + 0.1, uniform(N) + 0.1
    sums = torch.stack(((2 * uniform(N) - 1) * (grad_sq * global_sq).sqrt(), grad_sq), dim=1)
    global_sq[3] = -1.0
    hyper = torch.empty(GROUPS, Hyper.COUNT, dtype=torch.float64)
    hyper[:, Hyper.LR] = 1e-3 * uniform(GROUPS)
    hyper[:, Hyper.BETA1] = 0.8 + 0.15 * uniform(GROUPS)
    hyper[:, Hyper.BETA2] = 0.99 + 0.009 * uniform(GROUPS)
    hyper[:, Hyper.EPS] = 1e-8 * uniform(GROUPS)
    hyper[:, Hyper.WEIGHT_DECAY] = 0.1 * uniform(GROUPS)
    hyper[:, Hyper.SIGN] = torch.tensor([1.0, -1.0, 1.0])
    return {
        "sums": sums,
        "global_sq": global_sq,
        "hyper": hyper,
        "group": torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        "active": torch.tensor(ACTIVE),
        "steps": torch.tensor([0.0, 4, 2, 7, 1, 0, 3]),
        "bias_corrections": uniform(N, 2) * 0.5,
        "counters": torch.tensor([11, 2]),
        "table": torch.full((N, Coefficient.COUNT), float("nan"), dtype=torch.float64),
        "report": torch.full((N, 2), float("nan"), dtype=torch.float64),
        "summary": torch.full((Summary.COUNT,), float("nan"), dtype=torch.float64),
    }


def assert_same_coefficients(
    coefficients: object, settings: StepSettings, inputs: dict, optional: dict | None = None, **spoiled: object
) -> None:
    """Everything that ``coefficients`` writes, NaN where the reference leaves NaN."""
    optional = optional or {}
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    actual = {name: tensor.clone() for name, tensor in inputs.items()}
    reference.coefficients(StepTables(**expected), settings, StepOverrides(**optional))
    coefficients(StepTables(**actual), dataclasses.replace(settings, **spoiled), StepOverrides(**optional))
    for name in OUTPUTS:
        limit = TOLERANCES["table"].bound
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=limit,
            atol=limit,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


VARIANTS = {
    **{
        f"{mode}-{scope}": {"correction": mode, "scope": scope}
        for mode in CORRECTIONS
        for scope in ("tensor", "global")
    },
    "no clip": {"max_grad_norm": None},
    "loose clip": {"max_grad_norm": 1e3},
    "no reduction": {"reduce": False, "correction": "none", "max_grad_norm": None, "boost": 0.0, "total_steps": 0},
    "past the end": {"total_steps": 5},
    "clamped boost": {"boost": 9.0, "boost_max": 0.3},
    "tight bounds": {"bounds": (0.9, 1.1)},
}

OPTIONS = {
    "loss scale": {"loss_scale": torch.tensor(1024.0)},
    "found inf": {"loss_scale": torch.tensor(1024.0), "found_inf": torch.tensor(1.0)},
    "found none": {"found_inf": torch.tensor(0.0)},
    "gamma": {"gamma": torch.tensor(0.123)},
    "alpha": {"alpha": torch.linspace(0.2, 1.9, N)},
}

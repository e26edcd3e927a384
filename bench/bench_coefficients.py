"""``pytest bench``: the coefficients of a step of a large model, scalars alone."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.native import coefficients
from dba_kernels.stepdata import Coefficient, StepScalars, StepSettings, Summary

PARAMETERS = 3000


def fresh_scalars(hyper: torch.Tensor, group: torch.Tensor, global_sq: torch.Tensor) -> StepScalars:
    """Those before the first step, every parameter active."""
    n, wide = len(group), torch.float64
    return StepScalars(
        sums=torch.zeros(n, 2, dtype=wide),
        global_sq=global_sq,
        hyper=hyper,
        group=group,
        active=torch.arange(n),
        steps=torch.zeros(n),
        bias_corrections=torch.zeros(n, 2, dtype=wide),
        counters=torch.zeros(2, dtype=torch.int64),
        coefficients=torch.zeros(n, Coefficient.COUNT, dtype=wide),
        report=torch.zeros(n, 2, dtype=wide),
        summary=torch.zeros(Summary.COUNT, dtype=wide),
    )


@pytest.mark.parametrize("correction", ["none", "cosine", "pcgrad"])
def test_coefficients(benchmark, correction):
    hyper = torch.tensor([[1e-5, 0.9, 0.999, 1e-8, 1e-2, 1.0]], dtype=torch.float64)
    global_sq = torch.ones(PARAMETERS, dtype=torch.float64)
    scalars = fresh_scalars(hyper, torch.zeros(PARAMETERS, dtype=torch.int64), global_sq)
    scalars.sums.fill_(0.5)
    settings = StepSettings(0.2, 1000, 0.5, correction, max_grad_norm=1.0, reduce=True)
    benchmark.extra_info["parameters"] = PARAMETERS
    benchmark.pedantic(coefficients.coefficients, (scalars, settings), rounds=10, warmup_rounds=2)

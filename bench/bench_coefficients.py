"""``pytest bench``: the coefficients of a step of a large model, scalars alone."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.native import coefficients
from dba_kernels.stepdata import StepSettings

from .bench_step import fresh_tables

PARAMETERS = 3000


@pytest.mark.parametrize("correction", ["none", "cosine", "pcgrad"])
def test_coefficients(benchmark, correction):
    hyper = torch.tensor([[1e-5, 0.9, 0.999, 1e-8, 1e-2, 1.0]], dtype=torch.float64)
    global_sq = torch.ones(PARAMETERS, dtype=torch.float64)
    tables = fresh_tables(hyper, torch.zeros(PARAMETERS, dtype=torch.int64), global_sq)
    tables.sums.fill_(0.5)
    settings = StepSettings(0.2, 1000, 0.5, correction, max_grad_norm=1.0, reduce=True)
    benchmark.extra_info["parameters"] = PARAMETERS
    benchmark.pedantic(coefficients.coefficients, (tables, settings), rounds=10, warmup_rounds=2)

"""``pytest bench``: one micro-batch of stage 1, ``total += gradient`` and its norm; torch's own way beside it."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.native import accumulate

SHAPE = (1024, 1024)
TENSORS = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["native", "torch"])
def test_accumulate(benchmark, side, dtype):
    totals = [torch.zeros(SHAPE) for _ in range(TENSORS)]
    grads = [torch.randn(SHAPE).to(dtype) for _ in range(TENSORS)]
    norms = torch.zeros(TENSORS, dtype=torch.float64)

    def plain() -> None:
        for i, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            norms[i] = torch.linalg.vector_norm(grad, dtype=torch.float32)
            total.add_(grad)

    run = plain if side == "torch" else lambda: accumulate.accumulate(totals, grads, 1.0, norms)
    benchmark.extra_info["bytes_per_parameter"] = 8 + grads[0].element_size()
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)

"""``pytest bench``: the reduction before a step, per storage format of the global gradient."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.formats import STORAGE_FORMATS
from dba_kernels.native import quantize, similarity
from dba_kernels.stepdata import ParamTensors, TensorBatch

SHAPE = (2048, 2048)
TENSORS = 4


@pytest.mark.parametrize("format", STORAGE_FORMATS)
def test_similarity(benchmark, format):
    grads = [torch.randn(SHAPE).bfloat16() for _ in range(TENSORS)]
    stored = [quantize.encode(torch.randn(SHAPE), format) for _ in range(TENSORS)]
    tensors = [ParamTensors(i, grads[i], global_grad=stored[i]) for i in range(TENSORS)]
    batch = TensorBatch("native", "fp32", format, tensors)
    sums = torch.zeros(TENSORS, 2, dtype=torch.float64)
    benchmark.extra_info["bytes_per_parameter"] = 2 + STORAGE_FORMATS[format].bytes_per_parameter
    benchmark.pedantic(similarity.similarity, (batch, grads, sums), rounds=10, warmup_rounds=2)

"""``pytest bench``: encoding and decoding of whole tensors, per storage format."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.formats import STORAGE_FORMATS
from dba_kernels.native import quantize

SHAPE = (2048, 2048)
GROUPED = [name for name, format in STORAGE_FORMATS.items() if format.grouped]


@pytest.mark.parametrize("format", GROUPED)
def test_encode(benchmark, format):
    benchmark.extra_info["bytes_per_parameter"] = 4 + STORAGE_FORMATS[format].bytes_per_parameter
    benchmark.pedantic(quantize.encode, (torch.randn(SHAPE), format), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("format", GROUPED)
def test_decode(benchmark, format):
    benchmark.extra_info["bytes_per_parameter"] = 4 + STORAGE_FORMATS[format].bytes_per_parameter
    encoded, out = quantize.encode(torch.randn(SHAPE), format), torch.empty(SHAPE)
    benchmark.pedantic(quantize.decode, (encoded, out), rounds=10, warmup_rounds=2)

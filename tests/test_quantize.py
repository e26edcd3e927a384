"""quantize: encode and decode of every backend against the reference. (What a codec must do: tests/test_codecs.py.)"""

from __future__ import annotations

import dataclasses
import importlib
import itertools

import pytest
import torch

from dba_kernels.formats import STORAGE_FORMATS
from dba_kernels.reference import quantize as reference

from .support.agreement import GROUPED, assert_same_encoding, every_code
from .support.cases import Misaligned, random_tensor

SHAPES = ((64, 128), (65, 77), (3, 1501), (70, 3, 33), (1, 5000))
SMALL = ((0,), (), (63,), (3, 5), (1, 0))


@pytest.mark.parametrize("format", STORAGE_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode(backend, shape, format):
    """Protects stored files: codes and scales of every format agree with the reference, ragged rows included."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[SHAPES.index(shape) % 3]
    tensor = random_tensor(shape, torch.Generator().manual_seed(1)).to(dtype)
    assert_same_encoding(backend.encode, tensor, format)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_tensors_stay_fp32(backend, shape):
    """Protects precision: tensors too small to compress stay fp32."""
    assert_same_encoding(backend.encode, random_tensor(shape, torch.Generator().manual_seed(1)), "int8")


def difficult() -> torch.Tensor:
    """Groups that are zero, constant, huge, subnormal, with one outlier, and on the boundary between two codes."""
    tensor = torch.zeros(16, 384)
    tensor[1], tensor[2], tensor[3], tensor[4] = 0.1, 3e38, 1e-40, -1e-44
    tensor[5, ::64], tensor[5, 1::64] = 1e3, 1e-3
    tensor[6] = torch.arange(384) - 190.0
    tensor[7] = (torch.arange(384) % 15 - 7) * 0.5
    tensor[8] = 127.0 * 2.0**-126
    tensor[9] = 2.0 ** (-(torch.arange(384) % 40)).float()
    return torch.cat((tensor, -tensor))


@pytest.mark.parametrize("format", GROUPED)
def test_difficult_groups(backend, format):
    """Protects stored files: zeros, huge, subnormal and boundary values encode as in the reference."""
    assert_same_encoding(backend.encode, difficult(), format)


@pytest.mark.parametrize("format", GROUPED)
def test_decode_every_code(backend, format):
    """Protects reading: every code that a format can hold decodes to the reference's bits."""
    encoded = every_code(format)
    assert torch.equal(backend.decode(encoded), reference.decode(encoded))


@pytest.mark.parametrize("format", STORAGE_FORMATS)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_decode_into(backend, shape, format):
    """Protects ``out``: decoding into a narrower tensor fills it with the rounded values."""
    encoded = reference.encode(random_tensor(shape, torch.Generator().manual_seed(2)), format)
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    assert backend.decode(encoded, out) is out
    assert torch.equal(out, reference.decode(encoded).to(torch.bfloat16))
    assert torch.equal(backend.decode(encoded), reference.decode(encoded))


@pytest.mark.parametrize("format", GROUPED)
def test_misaligned_storage(backend, format):
    """Protects memory: storage that is not aligned gives the same codes, and nothing is written beside it."""
    place = Misaligned()
    tensor = random_tensor((64, 128), torch.Generator().manual_seed(3))
    assert_same_encoding(backend.encode, tensor, format, place)
    encoded = reference.encode(tensor, format)
    placed = dataclasses.replace(encoded, codes=place(encoded.codes), scales=place(encoded.scales))
    out = place(torch.full((64, 128), float("nan")))
    assert torch.equal(backend.decode(placed, out), reference.decode(encoded))
    place.check()


def test_row_shard_decodes_as_the_whole(backend):
    """Protects sharding by rows: a slice of the codes decodes to the slice of the tensor."""
    encoded = reference.encode(random_tensor((65, 77), torch.Generator().manual_seed(4)), "int4")
    assert torch.equal(backend.decode(encoded.row_slice(20, 41)), reference.decode(encoded)[20:41])


@pytest.mark.parametrize("format", STORAGE_FORMATS)
def test_many_tensors_at_once(format):
    """Sizes and dtypes mixed, small ones that stay fp32 among them: each as if it were alone."""
    kernels = importlib.import_module("dba_kernels.kernels.quantize")
    generator = torch.Generator().manual_seed(5)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    tensors = [random_tensor(shape, generator).to(dtype) for shape, dtype in zip((*SHAPES, *SMALL), dtypes)]  # noqa: B905
    encoded = kernels.encode_all(tensors, format)
    for tensor, stored, decoded in zip(tensors, encoded, kernels.decode_all(encoded), strict=True):
        assert_same_encoding(lambda _tensor, _format, found=stored: found, tensor, format)
        assert torch.equal(decoded, reference.decode(stored))
    with pytest.raises(AssertionError):  # control: another tensor's codes
        assert_same_encoding(
            lambda tensor, _: dataclasses.replace(encoded[0], shape=tuple(tensor.shape)), tensors[1], format
        )


def _half_up(tensor, format):
    encoded = reference.encode(tensor, format)
    return dataclasses.replace(encoded, codes=(encoded.codes.int() + 1).clamp(max=127).to(encoded.codes.dtype))


def _high_nibble_first(tensor, format):
    encoded = reference.encode(tensor, "int4")
    return dataclasses.replace(encoded, codes=(encoded.codes >> 4) | (encoded.codes << 4))


@pytest.mark.parametrize("wrong, format", [(_half_up, "int8"), (_high_nibble_first, "int4")])
def test_control_wrong_codes(wrong, format):
    """Negative control: codes rounded otherwise and nibbles swapped are noticed."""
    with pytest.raises(AssertionError):
        assert_same_encoding(wrong, random_tensor((65, 77), torch.Generator().manual_seed(1)), format)

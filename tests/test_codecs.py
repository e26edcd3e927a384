"""Codecs of ĝ_G and of the optimizer state: exhaustive over the codes, and against encoders written a second time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dba_kernels.formats import GROUP, MIN_COMPRESSED_NUMEL, STORAGE_FORMATS, matrix_shape, scales_shape
from dba_kernels.reference import quantize
from tests.support.codec_oracle import (
    CODECS,
    check_encoding,
    fp8_value,
    group_absmax,
    int4_values,
    per_element,
    round_to_bf16,
)

GROUPED = tuple(name for name, format in STORAGE_FORMATS.items() if format.grouped)
MAX = float(np.finfo(np.float32).max)
Encoded = tuple[np.ndarray, np.ndarray]


def encode(name: str, tensor: torch.Tensor) -> Encoded:
    """(codes, scales) of any of the five grouped codecs."""
    if name in GROUPED:
        encoded = quantize.encode(tensor, name)
        assert encoded.format == name
        return encoded.codes.numpy(), encoded.scales.numpy()
    codes, scales = (quantize.encode_exp_avg if name == "exp_avg" else quantize.encode_exp_avg_sq)(tensor)
    return codes.numpy(), scales.numpy()


def decode(name: str, codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of the reference's fp32 decoding."""
    parts = torch.from_numpy(codes.copy()), torch.from_numpy(scales.copy())
    if name in GROUPED:
        return quantize.decode(quantize.EncodedTensor(name, shape, *parts)).double().numpy()
    function = quantize.decode_exp_avg if name == "exp_avg" else quantize.decode_exp_avg_sq
    return function(*parts, shape).double().numpy()


def families() -> dict[str, np.ndarray]:
    """Matrices that codecs break on, fp32, 150 columns where not said otherwise: two full groups and a ragged one."""
    random = np.random.default_rng(0)
    shape = (30, 150)
    normal = random.normal(size=shape)
    outlier = normal * 1e-6
    outlier[:, ::GROUP] = 1.0
    mixed = normal * np.repeat(10.0 ** random.integers(-20, 20, size=(30, 3)), GROUP, axis=1)[:, :150]
    sparse = np.where(random.random(shape) < 0.95, 0.0, normal)
    found = {
        "normal": normal,
        "heavy tails": normal**7,
        "small gradients": normal * 1e-9,
        "zeros": np.zeros(shape),
        "constant": np.full(shape, -0.3),
        "constant but for signs": 0.7 * np.sign(normal),
        "huge": normal / 6 * MAX,
        "largest": np.sign(normal) * MAX * (1 - np.arange(150) * 2.0**-24),
        "subnormal": normal * 1e-41,
        "scales about to vanish": normal * 2.0**-126 * np.repeat(2.0 ** np.arange(30), 150).reshape(shape),
        "one outlier per group": outlier,
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "sparse": sparse,
        "groups far apart": mixed,
        "one-element rows": random.normal(size=(MIN_COMPRESSED_NUMEL, 1)),
        "odd columns": random.normal(size=(70, 65)),
        "uniform": random.uniform(-1, 1, size=(40, 512)),
    }
    with np.errstate(over="ignore"):
        return {name: value.astype(np.float32).astype(float) for name, value in found.items()}


FAMILIES = families()


def input_of(codec: str, family: str) -> np.ndarray:
    """The family's matrix; second moments are not negative."""
    return np.abs(FAMILIES[family]) if codec == "exp_avg_sq" else FAMILIES[family]


def as_tensor(matrix: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(matrix.astype(np.float32))


# --- exhaustive over the codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_decoding_every_code(name: str) -> None:
    """Protects decoding: all 256 bytes, at scales from the smallest to a huge one, against a bit-level formula."""
    dtype = np.int8 if name in ("int8", "exp_avg") else np.uint8
    codes = np.arange(256).astype(np.uint8).view(dtype).reshape(4, 64)
    cols = 128 if CODECS[name].packed else 64
    expected = CODECS[name].values(codes, cols)
    for scale in (1.0, 0.37, 2.0**-126, 1e28):
        scales = np.full((4, -(-cols // GROUP)), scale, dtype=np.float32)
        got = decode(name, codes, scales, (4, cols))
        # exp_avg_sq: c⁴ needs 32 bits, so it rounds once before the product with the scale does
        np.testing.assert_allclose(got, expected * float(np.float32(scale)), rtol=2.0**-23, atol=0)


def test_fp8_formula_itself() -> None:
    """Protects the formula that decoding is judged by: landmarks of the e4m3fn format, and 253 distinct numbers."""
    landmarks = {0x00: 0.0, 0x01: 2.0**-9, 0x07: 7 * 2.0**-9, 0x08: 2.0**-6, 0x38: 1.0, 0x7E: 448.0, 0xFE: -448.0}
    assert {code: fp8_value(code) for code in landmarks} == landmarks
    assert math.isnan(fp8_value(0x7F)) and math.isnan(fp8_value(0xFF))
    assert len({fp8_value(c) for c in range(256) if c & 0x7F != 0x7F}) == 253  # ±0 is one number


@pytest.mark.parametrize("name", CODECS)
def test_every_code_survives(name: str) -> None:
    """Protects the round trip: every code that a codec can produce comes back from its own decoded value."""
    codec = CODECS[name]
    cells = [part for code in codec.produced for part in (codec.top, code)]  # the largest code fixes the group's scale
    cols = len(cells)
    if codec.packed:
        cells = [(low & 0xF) | (high & 0xF) << 4 for low, high in zip(cells[0::2], cells[1::2], strict=True)]
    codes = np.array([cells], dtype=np.int16).astype(np.int8 if name in ("int8", "exp_avg") else np.uint8)
    codes = np.repeat(codes, -(-MIN_COMPRESSED_NUMEL // cols), axis=0)
    for scale in (1.0, 0.37, 2.0**-120, 1e25):
        scales = np.full((codes.shape[0], -(-cols // GROUP)), scale, dtype=np.float32)
        values = decode(name, codes, scales, (codes.shape[0], cols))
        again, scales_again = encode(name, as_tensor(values))
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_allclose(scales_again, scales, rtol=2.0**-22)


def test_int4_nibble_order() -> None:
    """Protects the packed layout: two codes per byte along the row, low nibble first, an odd row ends in a zero."""
    pairs = [(low, high) for low in range(-7, 8) for high in range(-7, 8)]
    codes = torch.tensor([[*pair, 5] for pair in pairs], dtype=torch.int8)
    packed = quantize.pack_int4(codes)
    assert packed.tolist() == [[(low % 16) + 16 * (high % 16), 5] for low, high in pairs]
    assert torch.equal(quantize.unpack_int4(packed, 3), codes)
    every_byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    expected = int4_values(every_byte.numpy(), 2)
    np.testing.assert_array_equal(quantize.unpack_int4(every_byte, 2).numpy(), expected)
    with pytest.raises(AssertionError):  # high nibble first
        np.testing.assert_array_equal(quantize.unpack_int4(every_byte, 2).flip(1).numpy(), expected)


@pytest.mark.parametrize("name", GROUPED)
def test_ties_round_to_even(name: str) -> None:
    """Protects the rounding rule, on every midpoint between two codes in a group of scale 1."""
    if CODECS[name].floats:
        values = [value for value in CODECS[name].floats[:128] if math.isfinite(value)]  # code 0, 1, …: they ascend
        middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
        expected = [values[i + i % 2] for i in range(len(middles))]  # neighbours are codes i and i + 1
    else:
        roots = [i + 0.5 for i in range(round(math.sqrt(CODECS[name].largest)))]
        even = [x - 0.5 if (x - 0.5) % 2 == 0 else x + 0.5 for x in roots]
        middles = [sign * x**2 for x in roots for sign in (1, -1)]
        expected = [sign * x**2 for x in even for sign in (1, -1)]
    cols = 2 * len(middles)
    row = np.full(cols, CODECS[name].largest)
    row[1::2] = middles
    encoded = quantize.encode(as_tensor(np.tile(row, (-(-MIN_COMPRESSED_NUMEL // cols), 1))), name)
    assert (encoded.scales == 1).all()
    assert quantize.decode(encoded)[0, 1::2].tolist() == expected


# --- against the second encoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CODECS)
def test_encoding(name: str, family: str) -> None:
    """Protects every grouped codec on every kind of matrix: scale of code 1 per group of 64 columns, nearest code."""
    matrix = input_of(name, family)
    codes, scales = encode(name, as_tensor(matrix))
    check_encoding(CODECS[name], matrix, codes, scales)
    decoded = decode(name, codes, scales, matrix.shape)
    assert np.isfinite(decoded).all()
    expected = CODECS[name].values(codes, matrix.shape[1]) * per_element(scales, matrix.shape[1])
    np.testing.assert_allclose(decoded, expected, rtol=2.0**-23, atol=2.0**-149)


@pytest.mark.parametrize("name", CODECS)
def test_wrong_encodings_are_noticed(name: str) -> None:
    """Negative control: truncation, groups across rows, a scale per row, or a missing floor of v fail the check."""
    matrix = input_of(name, "heavy tails")
    tensor = as_tensor(matrix)
    codes, scales = encode(name, tensor)
    check_encoding(CODECS[name], matrix, codes, scales)
    shifted = np.roll(codes, 1, axis=1)
    whole_row = np.repeat(scales.max(axis=1, keepdims=True), scales.shape[1], axis=1)
    toward_zero = codes.copy()
    toward_zero[codes.view(np.int8) > 1] -= 1
    wrong = [(shifted, scales), (codes, whole_row), (codes, scales * np.float32(1.001)), (toward_zero, scales)]
    if name == "exp_avg_sq":
        no_floor = np.where(codes == 1, 0, codes).astype(np.uint8)
        assert (no_floor != codes).any()
        wrong.append((no_floor, scales))
    for wrong_codes, wrong_scales in wrong:
        with pytest.raises(AssertionError):
            check_encoding(CODECS[name], matrix, wrong_codes, wrong_scales)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_formats(family: str) -> None:
    """Protects fp32 (exact), bf16 (nearest even on the bits) and fp16 (numpy's own conversion)."""
    matrix = FAMILIES[family]
    stored = {name: quantize.encode(as_tensor(matrix), name) for name in ("fp32", "bf16", "fp16")}
    decoded = {name: quantize.decode(encoded).double().numpy() for name, encoded in stored.items()}
    np.testing.assert_array_equal(decoded["fp32"], matrix)
    np.testing.assert_array_equal(decoded["bf16"], round_to_bf16(matrix))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(decoded["fp16"], matrix.astype(np.float16).astype(float))


# --- the bounds that the docstrings state -----------------------------------------------------------------------------


def error_bound(name: str, x: np.ndarray) -> np.ndarray:
    """The docstrings' bounds on \\|decoded − x\\|, per element, for groups that are not stored as zeros."""
    a = per_element(group_absmax(x), x.shape[1])
    magnitude = np.abs(x)
    if name == "bf16":
        return np.maximum(magnitude * 2.0**-8, 2.0**-134)
    if name == "fp16":
        return np.maximum(magnitude * 2.0**-11, 2.0**-25)
    bound = CODECS[name].bound
    assert bound is not None
    return bound(magnitude, a)


ORDINARY = [name for name in FAMILIES if name not in ("subnormal", "scales about to vanish", "huge", "largest")]


def worst_error(name: str, shrink: float = 1.0) -> float:
    """Largest error over its bound, in all ordinary families; asserts that it stays within ``shrink`` of the bound."""
    worst = 0.0
    for family in ORDINARY:
        x = FAMILIES[family]
        if name == "fp16":
            x = np.clip(x, -65504, 65504)
        decoded = (
            quantize.decode_exp_avg(*quantize.encode_exp_avg(as_tensor(x)), x.shape) if name == "exp_avg" else None
        )
        if decoded is None:
            decoded = quantize.decode(quantize.encode(as_tensor(x), name))
        error, bound = np.abs(decoded.double().numpy() - x), error_bound(name, x) * shrink
        assert (error <= bound * (1 + 1e-4)).all(), family
        worst = max(worst, (error[bound > 0] / bound[bound > 0]).max(initial=0.0))
    return worst


@pytest.mark.parametrize("name", [*GROUPED, "bf16", "fp16", "exp_avg"])
def test_error_bounds(name: str) -> None:
    """Protects the bounds in the docstrings: they hold, and they are tight (nine tenths of them are no bound)."""
    assert worst_error(name) > 0.98
    with pytest.raises(AssertionError):
        worst_error(name, shrink=0.9)


def root_error_and_bound(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of exp_avg_sq, for v > 0: relative error of √v, the bound (u + ¼)/u², and u = (v/scale)^¼."""
    codes, scales = quantize.encode_exp_avg_sq(as_tensor(x))
    decoded = quantize.decode_exp_avg_sq(codes, scales, x.shape).double().numpy()
    scale = per_element(scales.numpy(), x.shape[1])
    live = (x > 0) & (scale > 0)
    u = (x[live] / scale[live]) ** 0.25
    return (np.sqrt(decoded[live]) - np.sqrt(x[live])) / np.sqrt(x[live]), (u + 0.25) / u**2, u


def test_exp_avg_sq_bound() -> None:
    """Protects the bound on √v, its two stated figures, and what lies below the floor: it decodes larger."""
    worst = 0.0
    for family in ORDINARY:
        error, bound, u = root_error_and_bound(np.abs(FAMILIES[family]))
        above = u >= 0.5
        assert (np.abs(error[above]) <= bound[above] * (1 + 1e-3)).all(), family
        assert (error[~above] >= 0).all(), family
        worst = max(worst, (np.abs(error[above]) / bound[above]).max(initial=0.0))
    assert worst > 0.98

    sweep = np.concatenate(([1.0], np.geomspace(0.985, 1, 4000) ** 2, np.geomspace(0.0098, 0.0102, 4000) ** 2))
    error, _, _ = root_error_and_bound(np.stack((np.ones_like(sweep), sweep)).T)  # every row is a group of its own
    near_max, hundredth = np.abs(error[1::2][1:4001]), np.abs(error[1::2][4001:])
    assert 0.0035 < near_max.max() < 0.0040  # "0.4 % at the maximum of the group"
    assert 0.037 < hundredth.max() < 0.041  # "4 % where √v is a hundredth of it"


def test_floor_of_exp_avg_sq() -> None:
    """Protects the update: v > 0 never decodes to 0, which would divide by ε alone; without the floor it would."""
    v = torch.full((1, GROUP), 1e-16)
    v[0, 0], v[0, 1] = 1.0, 0.0
    codes, scales = quantize.encode_exp_avg_sq(v)
    assert codes[0, :3].tolist() == [255, 0, 1]
    update = 1e-8 / (quantize.decode_exp_avg_sq(codes, scales, (1, GROUP))[0, 2].sqrt() + 1e-8)
    assert 0 < update < 0.5  # exact: ½
    assert 1e-8 / (quantize.decode_exp_avg_sq(codes * 0, scales, (1, GROUP))[0, 2].sqrt() + 1e-8) == 1.0
    tiny = torch.full((1, GROUP), 1e-30)  # its scale would be subnormal: the group is stored as zeros
    codes, scales = quantize.encode_exp_avg_sq(tiny)
    assert not codes.any() and not scales.any()


# --- shapes, views, low rank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 70), (5, 0), (), (1,), (0,), (1, 1), (3, 65), (2, 3, 50), (4097,)])
def test_small_and_empty_tensors(shape: tuple[int, ...]) -> None:
    """Protects ragged, empty and one-element tensors: small or 1-D ones are stored as fp32; any moments work."""
    x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    for name in STORAGE_FORMATS:
        encoded = quantize.encode(x, name)
        assert encoded.format == "fp32" and torch.equal(quantize.decode(encoded), x)
        assert encoded.codes.data_ptr() != x.data_ptr() or x.numel() == 0  # a copy: the source may change
    rows, cols = matrix_shape(shape)
    for name, value in (("exp_avg", x), ("exp_avg_sq", x.abs())):
        codes, scales = encode(name, value)
        assert codes.shape == (rows, cols) and scales.shape == scales_shape(shape) == (rows, -(-cols // 64))
        matrix = value.reshape(rows, cols).double().numpy()
        check_encoding(CODECS[name], matrix, codes, scales)
        assert decode(name, codes, scales, shape).shape == shape


def check_row_slices(encode_rows: Callable[[torch.Tensor], list[torch.Tensor]], x: torch.Tensor) -> None:
    """Rows cut from the encoding are the encoding of the rows."""
    whole = encode_rows(x)
    for start, stop in ((0, 100), (3, 90), (60, 100), (7, 68)):
        for part, expected in zip(encode_rows(x[start:stop]), whole, strict=True):
            assert torch.equal(part, expected[start:stop])


def test_row_slices() -> None:
    """Protects sharding by rows, for every format: codes, scales and decoded values; groups across rows would fail."""
    x = torch.randn(100, 5, 30, generator=torch.Generator().manual_seed(0))
    for name in STORAGE_FORMATS:
        whole = quantize.encode(x, name)
        for start, stop in ((0, 100), (3, 90), (99, 100), (5, 5), (0, 1)):
            part = whole.row_slice(start, stop)
            assert part.shape == (stop - start, 5, 30)
            assert torch.equal(quantize.decode(part), quantize.decode(whole)[start:stop])
            assert part.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()  # a view
        check_row_slices(lambda t, name=name: [quantize.encode(t, name).codes], x)
    for name in GROUPED:
        check_row_slices(lambda t, name=name: [quantize.encode(t, name).scales], x)
    check_row_slices(lambda t: list(quantize.encode_exp_avg(t)), x)
    check_row_slices(lambda t: list(quantize.encode_exp_avg_sq(t.abs())), x)
    with pytest.raises(AssertionError):  # groups that cross rows: 150 is no multiple of 64
        check_row_slices(lambda t: [quantize.encode(t.reshape(1, -1), "int8").codes.reshape(-1, 150)], x)


@pytest.mark.parametrize("name", GROUPED)
def test_layout_of_the_source_does_not_matter(name: str) -> None:
    """Protects callers: transposed, narrow, fp64 and grad-requiring sources encode as their fp32 copy does."""
    x = torch.randn(128, 90, generator=torch.Generator().manual_seed(1))
    channels_last = x.reshape(16, 10, 8, 9).to(memory_format=torch.channels_last)
    for source in (x.t(), x.bfloat16(), x.double(), x.clone().requires_grad_(), x[:, 3:], x[::2], channels_last):
        got = quantize.encode(source, name)
        expected = quantize.encode(source.detach().float().contiguous().clone(), name)
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)
        assert got.codes.is_contiguous() and got.scales.is_contiguous()
        assert not got.codes.requires_grad and got.nbytes == expected.codes.numel() + 4 * expected.scales.numel()


def check_low_rank(rebuilt: torch.Tensor, x: torch.Tensor, rank: int) -> None:
    """As near as a matrix of this rank can be: √Σ_{i>r} σ_i² away, by numpy's float64 singular values."""
    sigma = np.linalg.svd(x.flatten(1).double().numpy(), compute_uv=False)
    expected = math.sqrt((sigma[rank:] ** 2).sum())
    assert (rebuilt.double() - x.double()).norm().item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("rank", [1, 7, 60])
def test_low_rank(rank: int) -> None:
    """Protects the truncated factorisation: the best one of its rank, for matrices and convolutions, cut by rows."""
    x = torch.randn(80, 4, 15, generator=torch.Generator().manual_seed(2))
    stored = quantize.factorize(x, rank, "fp32")
    assert (stored.rank, stored.u.shape, stored.v.shape) == (rank, (80, rank), (60, rank))
    check_low_rank(quantize.decode(stored), x, rank)
    np.testing.assert_allclose(
        quantize.decode(stored.row_slice(11, 40)).numpy(), quantize.decode(stored)[11:40].numpy(), atol=1e-6
    )
    with pytest.raises(AssertionError):  # singular values twice too large
        wrong = quantize.LowRankTensor(stored.shape, stored.u, stored.sigma * 2, stored.v)
        check_low_rank(quantize.decode(wrong), x, rank)


def test_low_rank_in_a_narrow_format() -> None:
    """Protects factors in another format: int8 factors of a matrix of rank 64 stay within 2 % of it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 200, generator=generator)
    stored = quantize.factorize(x, 64, "int8")
    assert stored.u.format == stored.v.format == "int8"
    error = ((quantize.decode(stored) - x).norm() / x.norm()).item()
    assert 0.001 < error < 0.02


# --- properties -------------------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40).map(lambda x: x if abs(x) > 2.0**-90 else 0.0)
"""Values that a factor of 2^±20 takes to normal numbers, or zero."""
rows_of = st.lists(finite, max_size=150)


def padded(row: list[float]) -> torch.Tensor:
    """The row, and rows of zeros until the tensor is large enough to be compressed."""
    x = torch.zeros(max(1, -(-MIN_COMPRESSED_NUMEL // max(len(row), 1))), len(row))
    x[0] = torch.tensor(row)
    return x


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows_of)
def test_any_row_encodes(row: list[float]) -> None:
    """Protects every grouped codec on any finite fp32 row, of any length, subnormals and extremes included."""
    for name, codec in CODECS.items():
        x = torch.tensor(row).reshape(1, len(row)) if name.startswith("exp") or not row else padded(row)
        if name in GROUPED and not row:
            continue
        x = x.abs() if name == "exp_avg_sq" else x
        codes, scales = encode(name, x)
        check_encoding(codec, x.double().numpy(), codes, scales)
        assert np.isfinite(decode(name, codes, scales, tuple(x.shape))).all()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(moderate, min_size=1, max_size=100), st.integers(-20, 20))
def test_codecs_are_consistent(row: list[float], exponent: int) -> None:
    """Protects three properties: a second round trip changes nothing, −x has −codes, 2^k·x has the same codes."""
    for name in CODECS:
        x = padded(row).abs() if name == "exp_avg_sq" else padded(row)
        codes, scales = encode(name, x)
        if ((scales > 0) & (scales < 2.0**-90)).any() or (scales == 0).all():
            continue
        again = encode(name, as_tensor(decode(name, codes, scales, tuple(x.shape))))
        np.testing.assert_array_equal(again[0], codes)
        np.testing.assert_array_equal(encode(name, x * 2.0**exponent)[0], codes)
        if name != "exp_avg_sq":
            negated = encode(name, -x)
            values = [decode(name, *parts, tuple(x.shape)) for parts in ((codes, scales), negated)]
            np.testing.assert_array_equal(values[0], -values[1])

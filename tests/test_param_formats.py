"""Parameter formats: the low-precision weight with its remainder, exhaustively, and in the regime they exist for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dba_kernels.reference import remainder
from tests.support.trajectories import displacement, relative_error

ALL16 = np.arange(1 << 16, dtype=np.int64)  # every pattern of a 16-bit weight
REMAINDERS = {
    "split16": (-32768, -32767, -12345, -257, -256, -255, -1, 0, 1, 127, 128, 255, 256, 4660, 32766, 32767),
    "split8": (-128, -127, -65, -64, -2, -1, 0, 1, 2, 63, 64, 77, 126, 127),
}
FP16_REMAINDERS = {  # half an ulp is 64 or 16384 units: at a tie the even weight takes it
    "split16": (-16384, -16380, -8192, -4100, -128, -64, -4, -2, 0, 2, 4, 64, 132, 4096, 8188, 16380, 16384),
    "split8": (-64, -63, -33, -32, -31, -2, -1, 0, 1, 2, 31, 32, 33, 63, 64),
}
Split = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fp32_of(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def patterns(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a 16-bit tensor as unsigned numbers."""
    return tensor.view(torch.int16).numpy().astype(np.int64) & 0xFFFF


def finite_fp32(count: int, seed: int) -> np.ndarray:
    """Random bit patterns of finite fp32 numbers: every exponent, subnormals included."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, size=count)
    return bits[(bits >> 23) & 0xFF != 0xFF]


# --- bf16 -------------------------------------------------------------------------------------------------------------


def check_bf16(format: str, split: Split) -> int:
    """All 65,536 weights × a set of remainders, both ways, in integer arithmetic; returns the pairs checked."""
    unit = 1 if format == "split16" else 256
    checked = 0
    for rest in REMAINDERS[format]:
        bits = (ALL16 << 16) + rest * unit
        ordinary = (bits >= 0) & (bits >> 31 == ALL16 >> 15) & ((bits >> 23) & 0xFF != 0xFF)  # finite, sign kept
        weight = torch.from_numpy(ALL16[ordinary].astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        value = fp32_of(bits[ordinary])
        stored = torch.full(weight.shape, rest, dtype=torch.int16 if format == "split16" else torch.int8)
        joined = remainder.join(weight, stored, format)
        assert torch.equal(joined.view(torch.int32), value.view(torch.int32))
        got_weight, got_rest = split(value, torch.bfloat16, format)
        np.testing.assert_array_equal(patterns(got_weight), ALL16[ordinary])
        assert torch.equal(got_rest, stored) and got_rest.dtype == stored.dtype
        checked += int(ordinary.sum())
    return checked


@pytest.mark.parametrize("format", ["split16", "split8"])
def test_bf16_exhaustive(format: str) -> None:
    """Protects join and split on every bf16 weight, infinities as upper neighbours included."""
    assert check_bf16(format, remainder.split) > 65_000 * len(REMAINDERS[format])


@pytest.mark.parametrize("format", ["split16", "split8"])
def test_wrong_bf16_split_is_noticed(format: str) -> None:
    """Negative control: a truncated weight, or torch's ties to even, whose remainder does not fit, fail the sweep."""

    def truncating(value: torch.Tensor, dtype: torch.dtype, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        bits = value.view(torch.int32)
        low = bits & 0xFFFF
        rest = low.to(torch.int16) if format == "split16" else (low >> 8).to(torch.int8)
        return (bits >> 16).to(torch.int16).view(torch.bfloat16), rest

    def ties_to_even(value: torch.Tensor, dtype: torch.dtype, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = value.to(torch.bfloat16)
        low = value.view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
        return weight, low.to(torch.int16) if format == "split16" else (low >> 8).to(torch.int8)

    for wrong in (truncating, ties_to_even):
        with pytest.raises(AssertionError):
            check_bf16(format, wrong)


def test_bf16_split16_is_exact() -> None:
    """Protects "weight and remainder are the fp32 value": a million random finite patterns return bit by bit."""
    value = fp32_of(finite_fp32(1_000_000, seed=0))
    weight, rest = remainder.split(value, torch.bfloat16, "split16")
    assert torch.equal(remainder.join(weight, rest, "split16").view(torch.int32), value.view(torch.int32))
    nearest = value.to(torch.bfloat16)  # where it differs, value lies exactly between two bf16 numbers
    ties = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties].view(torch.int16), nearest[~ties].view(torch.int16))


# --- fp16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["split16", "split8"])
def test_fp16_exhaustive(format: str) -> None:
    """Protects join and split on all 63,488 finite fp16 weights: every remainder whose value is an fp32 number."""
    patterns16 = ALL16[(ALL16 >> 10) & 0x1F != 0x1F]
    halves = patterns16.astype(np.uint16).view(np.float16)
    fraction = 15 if format == "split16" else 7
    exponent = np.maximum((patterns16 >> 10) & 0x1F, 1) - 15
    unit = 2.0 ** (exponent - 10 - fraction)
    checked = 0
    for rest in FP16_REMAINDERS[format]:
        exact = halves.astype(float) + rest * unit
        value = exact.astype(np.float32)
        with np.errstate(over="ignore"):
            # representable, its nearest fp16 (numpy's, ties to even) is this weight, and not the other zero
            ordinary = (value == exact) & (value.astype(np.float16).view(np.uint16) == patterns16)
        value, expected = torch.from_numpy(value[ordinary]), patterns16[ordinary]
        weight, got = remainder.split(value, torch.float16, format)
        np.testing.assert_array_equal(patterns(weight), expected)
        assert (got == rest).all()
        assert torch.equal(remainder.join(weight, got, format), value)
        checked += len(expected)
    assert checked > (800_000 if format == "split16" else 500_000)


def check_fp16_precision(join: Callable[..., torch.Tensor]) -> None:
    """Random fp32 values of every fp16 exponent: exact from 2⁻¹⁶ on, within 2⁻⁴⁰ below, zero weights included."""
    random = np.random.default_rng(1)
    for low, high, bound in ((-16, 15.99, 0.0), (-24, -16, 2.0**-40), (-45, -24, 2.0**-40)):
        magnitude = np.minimum(np.exp2(random.uniform(low, high, 50_000)), 65504.0)
        value = torch.from_numpy((magnitude * random.choice([-1, 1], 50_000)).astype(np.float32))
        weight, rest = remainder.split(value, torch.float16, "split16")
        error = (join(weight, rest, "split16").double() - value.double()).abs().max().item()
        assert error <= bound
        assert (low > -40 and high > -24) or (weight == 0).any()


def test_fp16_split16_precision() -> None:
    """Protects the docstring's figures for fp16; one bit less of the remainder breaks them."""
    check_fp16_precision(remainder.join)
    with pytest.raises(AssertionError):
        check_fp16_precision(lambda weight, rest, format: remainder.join(weight, rest & ~1, format))
    with pytest.raises(AssertionError):
        check_fp16_precision(lambda weight, rest, format: weight.float())


def test_master_is_the_value() -> None:
    """Protects master: the remainder is the fp32 value, the weight its nearest."""
    value = fp32_of(finite_fp32(1000, seed=2))
    for dtype in (torch.bfloat16, torch.float16):
        weight, rest = remainder.split(value, dtype, "master")
        assert torch.equal(remainder.join(weight, rest, "master"), value)
        assert torch.equal(weight, value.to(dtype))


# --- the regime -------------------------------------------------------------------------------------------------------

MAGNITUDES = (0.02, 0.2, 1.0)


@pytest.fixture(scope="module")
def regime() -> Callable[[torch.dtype, str], list[float]]:
    """1,000 Adam steps, lr 1e-6 → 0, one row of weights per magnitude: each row's error relative to the displacement of
    an fp32 master, and of an fp64 one under the name "fp64"."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(MAGNITUDES).unsqueeze(1) * (1 + 0.1 * torch.rand(3, 256, generator=generator))
    start = (size * torch.randn(3, 256, generator=generator).sign()).bfloat16().double()
    moved = {x: displacement(start, x, steps=1000, lr=1e-6) for x in (torch.float32, torch.float64)}
    assert (moved[torch.float64].abs().mean(dim=1) > 1e-4).all()

    def errors(dtype: torch.dtype, format: str, master: torch.dtype = torch.float32) -> list[float]:
        got = displacement(start, dtype, format, steps=1000, lr=1e-6)
        return [relative_error(row, expected) for row, expected in zip(got, moved[master], strict=True)]

    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regime_split16(regime: Callable[..., list[float]], dtype: torch.dtype) -> None:
    """Protects split16 where it matters: not 1e-3 but nothing at all is lost against an fp32 master."""
    assert regime(dtype, "split16") == [0.0, 0.0, 0.0]


def test_regime_fp32_itself(regime: Callable[..., list[float]]) -> None:
    """Protects the yardstick: how far the fp32 master is from an fp64 one. Seen: 7.2e-5, 5.6e-4, 8.5e-3."""
    small, middle, one = regime(torch.float32, "native", torch.float64)
    assert small < 1e-4 and middle < 1e-3 and one < 1e-2


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        (torch.bfloat16, (0.03, 0.13, 0.42)),  # seen: 0.024, 0.103, 0.340
        (torch.float16, (0.008, 0.058, 0.21)),  # seen: 0.0065, 0.046, 0.168
    ],
)
def test_regime_split8(
    regime: Callable[..., list[float]], dtype: torch.dtype, bounds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects split8: its error is the noise of an unbiased rounding, bounded; rounding to nearest loses all."""
    errors = regime(dtype, "split8")
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True))
    monkeypatch.setattr(remainder, "random_words", lambda shape, *_: torch.full(shape, 128 << 24))
    nearest = regime(dtype, "split8")
    assert all(worse > 1.4 * error for worse, error in zip(nearest, errors, strict=True))
    assert nearest[2] == 1.0  # at |θ| = 1 nothing moves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regime_native_fails(regime: Callable[..., list[float]], dtype: torch.dtype) -> None:
    """Negative control: a plain low-precision weight does not move in this regime. Seen: 1.0 at every magnitude."""
    assert min(regime(dtype, "native")) > 0.99

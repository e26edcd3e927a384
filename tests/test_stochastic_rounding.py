"""split8's stochastic rounding: the counter-based random bytes, and what is rounded with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dba_kernels.reference import remainder, step
from tests.support.trajectories import batch_of, coefficient_row, gradient, value_of

CPU = torch.device("cpu")
BYTES = torch.arange(256)

# --- the random bytes -------------------------------------------------------------------------------------------------


def hash32(x: int) -> int:
    """lowbias32 on Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def random_word(seed: int, step: int, index: int) -> int:
    """The word of element ``index`` as the docstring defines it."""
    key = hash32((seed + step * 0x9E3779B9 + (index >> 32) * 0x85EBCA6B) % 2**32)
    return hash32((index % 2**32) ^ key)


def low_halves(seed: int = 3, step: int = 1, offset: int = 0, count: int = 1 << 16) -> torch.Tensor:
    """The second byte from below: the upper one of those that round bf16 exp_avg_sq."""
    return (remainder.random_words((count,), seed, step, offset, CPU) >> 8) & 0xFF


def draws(seed: int = 3, step: int = 1, offset: int = 0, count: int = 1 << 16) -> torch.Tensor:
    return remainder.random_words((count,), seed, step, offset, CPU) >> 24


VECTORS = {
    0: 0,
    1: 0x688990C0,
    2: 0xD1132181,
    0x9E3779B9: 0x1FCE552,
    0xDEADBEEF: 0xE628C683,
    0xFFFFFFFF: 0x6768824A,
}
"""Input → output, from :func:`hash32`."""


def test_hash_known_vectors() -> None:
    """Protects the hash: fixed input–output pairs, and its published inverse undoes it (so it is a permutation)."""
    inputs = torch.tensor(list(VECTORS))
    assert remainder.mix32(inputs).tolist() == list(VECTORS.values())
    assert [hash32(x) for x in VECTORS] == list(VECTORS.values())
    inverse1, inverse2 = pow(0x846CA68B, -1, 2**32), pow(0x7FEB352D, -1, 2**32)
    assert (inverse1, inverse2) == (0x43021123, 0x1D69E2A5)  # the constants of lowbias32_r
    x = remainder.mix32(torch.arange(100_000) * 42_949 % 2**32)
    x = x ^ (x >> 16)
    x = (x * inverse1) & 0xFFFFFFFF
    x = x ^ (x >> 15) ^ (x >> 30)
    x = (x * inverse2) & 0xFFFFFFFF
    assert torch.equal(x ^ (x >> 16), torch.arange(100_000) * 42_949 % 2**32)


def test_hash_avalanche() -> None:
    """Protects the hash's quality: flipping any input bit flips each output bit in 0.45 to 0.55 of 20,000 inputs."""
    x = torch.from_numpy(np.random.default_rng(5).integers(0, 1 << 32, 20_000))
    flips = torch.stack([remainder.mix32(x) ^ remainder.mix32(x ^ (1 << i)) for i in range(32)])
    share = torch.stack([((flips >> j) & 1).double().mean(dim=1) for j in range(32)])
    assert share.min() > 0.45 and share.max() < 0.55  # seen: 0.490 and 0.512


@pytest.mark.parametrize(
    ("seed", "step", "offset"),
    [(0, 1, 0), (1, 1, 0), (0xFFFFFFFF, 7, 1000), (123456789, 10**6, 2**31 - 8), (5, 3, 2**32 - 8), (9, 2, 2**35 + 5)],
)
def test_random_words_definition(seed: int, step: int, offset: int) -> None:
    """Protects the counter: plain integers give the same words, beyond 2³² elements and for any seed and step."""
    expected = [random_word(seed, step, offset + i) for i in range(16)]
    assert remainder.random_words((4, 4), seed, step, offset, CPU).flatten().tolist() == expected
    for other in ((seed ^ 1, step, offset), (seed, step + 1, offset), (seed, step, offset + 1)):
        assert remainder.random_words((16,), *other, CPU).tolist() != expected


def chi_square_z(counts: np.ndarray) -> float:
    """How many standard deviations χ² of equal expectations lies from its mean (its normal approximation)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom)


def pair_z(x: torch.Tensor, y: torch.Tensor) -> float:
    """χ² of all 256 × 256 pairs of bytes."""
    return chi_square_z(np.bincount((x * 256 + y).numpy(), minlength=1 << 16))


def correlation_z(x: torch.Tensor, y: torch.Tensor) -> float:
    """How many standard deviations the correlation of two streams of bytes lies from 0."""
    x, y = x.double() - 127.5, y.double() - 127.5
    return ((x * y).mean() / (65535 / 12) * math.sqrt(x.numel())).item()


def check_random(draw: Callable[..., torch.Tensor]) -> None:
    """Uniform over elements and over steps; independent of other steps and seeds; uncorrelated with neighbours."""
    large = 1 << 20
    base = draw(count=large)
    assert abs(chi_square_z(np.bincount(base.numpy(), minlength=256))) < 4  # seen: 1.6
    over_steps = torch.cat([draw(step=k, count=64) for k in range(1, 2001)])
    assert abs(chi_square_z(np.bincount(over_steps.numpy(), minlength=256))) < 4  # seen: -0.5
    for other in (draw(step=2, count=large), draw(seed=4, count=large)):
        assert abs(pair_z(base, other)) < 4  # seen: -1.7 and 0.2
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 65536):
        assert abs(correlation_z(base, base.roll(lag))) < 4  # seen: at most 1.6
    # Over steps the bytes of an element must add up as independent ones do, or rounding errors would pile up.
    sums = torch.stack([draw(step=k, count=4096) - 127.5 for k in range(1, 257)]).sum(dim=0)
    assert 0.9 < (sums.square().mean() / (256 * 65535 / 12)).item() < 1.1  # seen: 1.004


def test_random_bytes_are_uniform_and_independent() -> None:
    """Protects stochastic rounding from a bad generator; three weaker generators fail the same check."""
    check_random(draws)
    check_random(low_halves)
    large = {"count": 1 << 20}
    assert abs(correlation_z(draws(**large), low_halves(**large))) < 4  # the rounding of a weight and of its v

    def counter(seed: int = 3, step: int = 1, offset: int = 0, count: int = 1 << 16) -> torch.Tensor:
        return (torch.arange(count) + 31 * seed + 17 * step) & 0xFF

    def same_every_step(seed: int = 3, step: int = 1, offset: int = 0, count: int = 1 << 16) -> torch.Tensor:
        return draws(seed, 1, offset, count)

    def multiplicative(seed: int = 3, step: int = 1, offset: int = 0, count: int = 1 << 16) -> torch.Tensor:
        return ((torch.arange(count) * 0x9E3779B1 + seed + step) & 0xFFFFFFFF) >> 24

    for weak in (counter, same_every_step, multiplicative):
        with pytest.raises(AssertionError):
            check_random(weak)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
def test_shards_draw_as_the_whole(state_format: str) -> None:
    """Protects sharding: a shard that knows its offset draws, and steps, exactly as its rows of the whole tensor do."""
    whole = draws(count=1000)
    assert torch.equal(draws(offset=300, count=200), whole[300:500])
    assert not torch.equal(draws(offset=0, count=200), whole[300:500])

    start = 0.03 * torch.randn(12, 70, generator=torch.Generator().manual_seed(4))
    start = start.bfloat16().float()

    def after_ten_steps(low: int, high: int, offset: int) -> torch.Tensor:
        batch = batch_of(start[low:high], torch.bfloat16, "split8", state_format, seed=77, offset=offset)
        for t in range(10):
            step.step(batch, [gradient((12, 70), t)[low:high]], coefficient_row(t, 10, 1e-5, 0.0, 0.0))
        return value_of(batch)

    full = after_ten_steps(0, 12, 0)
    assert torch.equal(after_ten_steps(5, 9, 5 * 70), full[5:9])
    assert not torch.equal(after_ten_steps(5, 9, 0), full[5:9])  # negative control: the offset matters


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_unbiased_over_all_bytes(dtype: torch.dtype) -> None:
    """Protects split8's rounding: over the 256 equally likely bytes the mean is exactly the value, and only the two
    neighbours on the grid occur; for either sign and across powers of two."""
    random = np.random.default_rng(6)
    magnitudes = np.exp2(random.uniform(-14, 10, 200)).astype(np.float32)
    edges = np.float32([1.0, 2.0, 0.5]) * (1 + np.float32([[-(2.0**-24)], [2.0**-23], [3 * 2.0**-20]]))
    for magnitude in (*magnitudes, *edges.astype(np.float32).ravel()):
        for sign in (-1, 1):
            value = torch.full((256,), sign * float(magnitude))
            got = remainder.join(*remainder.split(value, dtype, "split8", BYTES), "split8").double()
            assert got.mean().item() == value[0].item()
            assert len(got.unique()) <= 2
            spacing = 2.0 ** math.floor(math.log2(magnitude)) * 2.0 ** (-15 if dtype == torch.bfloat16 else -17)
            assert (got - value.double()).abs().max() < 2 * spacing


def rounding_z(draw: torch.Tensor, dtype: torch.dtype) -> float:
    """z of the mean error of a million roundings of random weights, in units of its standard error."""
    generator = torch.Generator().manual_seed(8)
    value = 0.02 + 0.01 * torch.rand(draw.numel(), generator=generator)
    error = remainder.join(*remainder.split(value, dtype, "split8", draw), "split8").double() - value.double()
    return (error.mean() / (error.std() / math.sqrt(draw.numel()))).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_unbiased_with_drawn_bytes(dtype: torch.dtype) -> None:
    """Protects the generator and the rounding together: |z| < 4; truncation and bytes below 128 fail."""
    million = draws(count=1_000_000)
    assert abs(rounding_z(million, dtype)) < 4
    assert abs(rounding_z(million * 0, dtype)) > 100
    assert abs(rounding_z(million // 2, dtype)) > 100


def check_bf16_rounding(round_: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Over all 65,536 low halves of a word the mean is exactly the value; the high half does not matter."""
    words = torch.arange(1 << 16) | (0xABCD << 16)
    for number in (1.0, 1e-12, 0.7, 3e5, 1 - 2.0**-24, 1 + 2.0**-23, 1e-30, 0.0):
        value = torch.full((1 << 16,), number)
        assert round_(value, words).double().mean().item() == value[0].item()


def test_bf16_rounding_is_unbiased() -> None:
    """Protects bf16 exp_avg_sq, which could not decay if it were rounded to nearest."""
    check_bf16_rounding(remainder.stochastic_bf16)
    for wrong in (
        lambda value, words: value.bfloat16(),
        lambda value, words: remainder.stochastic_bf16(value, words >> 16),
        lambda value, words: remainder.stochastic_bf16(value, words >> 1),
    ):
        with pytest.raises(AssertionError):
            check_bf16_rounding(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_on_the_grid_stay(dtype: torch.dtype) -> None:
    """Protects a step of zero: what split8 has stored is stored again unchanged, whatever byte is drawn."""
    value = torch.randn(5000, generator=torch.Generator().manual_seed(9))
    weight, rest = remainder.split(value, dtype, "split8", draws(count=5000))
    for random in (None, draws(count=5000, step=2), torch.full((5000,), 255)):
        again = remainder.split(remainder.join(weight, rest, "split8"), dtype, "split8", random)
        assert torch.equal(remainder.join(*again, "split8"), remainder.join(weight, rest, "split8"))

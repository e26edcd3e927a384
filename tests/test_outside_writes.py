"""Weights written between steps: pruning masks, reset adapters, reloaded models: what was written counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dba_kernels import DBAAdamW, GlobalGradient, ops
from dba_kernels.formats import PARAM_FORMATS
from dba_kernels.native import library as native
from dba_kernels.reference import remainder

from .support.cases import Case, build

ALL16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # every pattern of a 16-bit weight
DTYPES = (torch.bfloat16, torch.float16)
FORMATS = ("native", "split16", "split8", "master")
LARGEST_REST = {  # by magnitude, of what a step leaves beside a weight
    (torch.bfloat16, "split16"): 1 << 15,
    (torch.bfloat16, "split8"): 1 << 7,
    (torch.float16, "split16"): 1 << 14,
    (torch.float16, "split8"): 1 << 6,
}
Join = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


def patterns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def remainders(dtype: torch.dtype, format: str) -> list[int]:
    """All that occur where they are few; of split16's, every power of two with its neighbours."""
    largest = LARGEST_REST[dtype, format]
    if format == "split8":
        return list(range(-largest, largest + (dtype == torch.float16)))
    powers = {2**k + d for k in range(16) for d in (-1, 0, 1)} | {0, 12345, 8191, 8193}
    found = {sign * value for sign, value in itertools.product((1, -1), powers) if value <= largest}
    return sorted(found - ({largest} if dtype == torch.bfloat16 else set()))


def neighbours(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """float64 middles between each finite weight and the next ones toward and away from zero, as magnitudes."""
    bits = patterns(weight).numpy().astype(np.int64) & 0x7FFF

    def value(pattern: np.ndarray) -> np.ndarray:
        if weight.dtype == torch.bfloat16:
            with np.errstate(invalid="ignore"):
                return (pattern << 16).astype(np.uint32).view(np.float32).astype(float)
        return pattern.astype(np.uint16).view(np.float16).astype(float)

    here = value(bits)
    with np.errstate(invalid="ignore"):
        toward, away = here - value(np.maximum(bits - 1, 0)), value(bits + 1) - here
        return here - toward / 2, here + np.where(np.isfinite(away), away, toward) / 2


def check_join(dtype: torch.dtype, format: str, join: Join) -> None:
    """Every weight with every remainder: a number next to the weight, nearer to it than to any other weight."""
    weight = ALL16.view(dtype)
    number = ~weight.isnan()
    finite = torch.isfinite(weight)
    inner, outer = neighbours(weight)
    whole = weight.float()
    for rest in remainders(dtype, format):
        value = join(weight, torch.full(weight.shape, rest, dtype=PARAM_FORMATS[format].remainder), format)
        assert torch.equal(value.isnan(), ~number), rest
        magnitude = value.double().abs().numpy()
        inside = (magnitude >= inner) & (magnitude <= outer)
        assert inside[finite.numpy()].all(), (rest, weight[finite][torch.from_numpy(~inside)[finite]][:3])
        assert torch.equal(value.sign()[finite & (whole != 0)], whole.sign()[finite & (whole != 0)])
        if rest >= 0 and dtype == torch.bfloat16:
            assert torch.equal(value[weight.isinf()], whole[weight.isinf()])


@pytest.mark.parametrize("format", ["split16", "split8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_written_weight_is_taken(dtype: torch.dtype, format: str) -> None:
    """Protects join: any of the 65,536 weights beside any remainder is that weight to half an ulp, never a NaN."""
    check_join(dtype, format, remainder.join)


@pytest.mark.parametrize("dtype", DTYPES)
def test_join_that_believes_every_remainder_is_noticed(dtype: torch.dtype) -> None:
    """Negative control: plain addition, as it once was, makes a NaN of 0, or crosses a power of two."""

    def plain(weight: torch.Tensor, rest: torch.Tensor, format: str) -> torch.Tensor:
        if dtype == torch.bfloat16:
            return ((patterns(weight).int() << 16) + rest.int()).view(torch.float32)
        unit = torch.exp2(remainder._fp16_unit_exponent(weight, format).float())
        return weight.float() + rest.float() * unit

    with pytest.raises(AssertionError):
        check_join(dtype, "split16", plain)


def test_special_bf16_weights_beside_all_remainders() -> None:
    """Protects the borrow: ±0, ±inf, subnormals and the largest numbers, each beside all 65,536 remainders."""
    for pattern in (0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x0080, 0x3F80):
        weight = torch.full((1 << 16,), pattern - (pattern >> 15 << 16), dtype=torch.int16).view(torch.bfloat16)
        value = remainder.join(weight, ALL16, "split16")
        assert not value.isnan().any()
        again, _ = remainder.split(value, torch.bfloat16, "split16")
        assert torch.equal(patterns(again), patterns(weight)), hex(pattern)


# --- through the optimizer, in every backend --------------------------------------------------------------------------


def optimizer_over(weight: torch.Tensor, format: str, backend: str, lr: float = 1e-2) -> DBAAdamW:
    return DBAAdamW([weight], lr=lr, weight_decay=0.0, param_format=format, backend=backend)


def stepped(optimizer: DBAAdamW, weight: torch.Tensor, grad: torch.Tensor) -> None:
    weight.grad = grad.to(weight.dtype)
    optimizer.step()


@pytest.fixture(params=["reference", "triton", *(f"native-{isa}" for isa in native.usable_isas())])
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, the native one with every instruction set."""
    name, _, isa = request.param.partition("-")
    if name == "native":
        if (reason := native.why_not()) is not None:
            pytest.skip(reason)
        with native.use_isa(isa):
            yield name
    else:
        yield name


@pytest.mark.parametrize(("dtype", "format"), list(itertools.product(DTYPES, ("split16", "split8", "master"))))
def test_backends_take_every_written_weight(backend_name: str, dtype: torch.dtype, format: str) -> None:
    """Protects each backend's join: after a step that moves nothing, all finite weights are what was written."""
    every = ALL16.view(dtype)[torch.isfinite(ALL16.view(dtype))].clone()
    if (backend_name, dtype, format) == ("triton", torch.bfloat16, "master"):
        every = every[(every == 0) | (every.abs() >= 2.0**-126)]  # Triton's interpreter converts no bf16 subnormals
    every = torch.cat([every, every.new_zeros(-len(every) % 512 + 77)])  # and a ragged tail
    weight = torch.nn.Parameter(torch.randn(every.numel(), generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = optimizer_over(weight, format, backend_name)
    stepped(optimizer, weight, torch.ones_like(weight))
    optimizer.param_groups[0]["lr"] = 0.0
    if format == "master":
        rests = [optimizer.state[weight]["remainder"].clone(), torch.full_like(every, 1.5).float()]
    else:
        largest = LARGEST_REST[dtype, format]
        near = largest - (4 if largest == 1 << 14 else 1)  # fp16: at a tie the even neighbour counts
        rests = [torch.full(every.shape, rest) for rest in (-near, -1, 1, near, -(largest // 2) - 1)]
    for rest in rests:
        with torch.no_grad():
            weight.copy_(every)
        optimizer.state[weight]["remainder"].copy_(rest)
        stepped(optimizer, weight, torch.zeros_like(weight))
        assert torch.equal(weight, every)
        value = remainder.join(weight.data, optimizer.state[weight]["remainder"], format)
        assert ((value - every.float()).abs() <= every.float().abs() * 2.0**-8 + 2.0**-24).all()


@pytest.mark.parametrize(("dtype", "format"), list(itertools.product(DTYPES, FORMATS)))
def test_reset_weights_move_on(backend_name: str, dtype: torch.dtype, format: str) -> None:
    """Protects training after a reset: one step later every weight is one step away, and none stays."""
    for written in (0.0, -0.5) if backend_name == "triton" else (0.0, -0.0, 1e-7, 0.25, -0.5):
        weight = torch.nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
        optimizer = optimizer_over(weight, format, backend_name)
        grads = torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        for grad in grads[:4]:
            stepped(optimizer, weight, grad)
        with torch.no_grad():
            weight.fill_(written)
        before = weight.detach().float().clone()
        stepped(optimizer, weight, grads[4])
        assert (weight.float() - before).abs().max() <= 0.035 + abs(written) * 2.0**-7  # Adam's largest step, rounding
        for grad in grads[5:]:
            stepped(optimizer, weight, grad)
        assert torch.isfinite(weight).all()
        assert (weight.float() == before).float().mean() < 0.1


def test_master_notices_single_weights(backend_name: str) -> None:
    """Protects master: the copy of a written weight is dropped, its neighbours keep theirs to the bit."""
    weight = torch.nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = optimizer_over(weight, "master", backend_name, lr=1e-5)
    stepped(optimizer, weight, torch.ones_like(weight))
    optimizer.param_groups[0]["lr"] = 0.0
    copy = optimizer.state[weight]["remainder"].clone()
    assert (copy != weight.float()).any()  # there is something to lose
    with torch.no_grad():
        weight[::2, ::3] = 0.25
    stepped(optimizer, weight, torch.zeros_like(weight))
    copy[::2, ::3] = 0.25
    assert torch.equal(optimizer.state[weight]["remainder"], copy)


@pytest.mark.parametrize("format", ["split16", "master"])
def test_masking_after_every_step_costs_nothing(backend_name: str, format: str) -> None:
    """Protects sparse training: weights beside the masked ones stay the exact fp32 values of a run in fp32."""
    start = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    low, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    narrow = optimizer_over(low, format, backend_name, lr=1e-6)
    exact = optimizer_over(wide, "native", backend_name, lr=1e-6)
    for t in range(6):
        grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 + t)).bfloat16()
        for optimizer, weight in ((narrow, low), (exact, wide)):
            stepped(optimizer, weight, grad)
            with torch.no_grad():
                weight.mul_(mask)
    value = remainder.join(low.data, narrow.state[low]["remainder"], format)
    assert torch.equal(value[mask], wide.data[mask]) and (value[mask] != start.float()[mask]).any()
    assert (low.data[~mask] == 0).all() and value[~mask].abs().max() < 2e-6


def test_written_weights_after_saving_and_loading(backend_name: str) -> None:
    """Protects a reload: zeros written before the state is loaded into another optimizer count as well."""
    weight = torch.nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = optimizer_over(weight, "split16", backend_name)
    stepped(optimizer, weight, torch.randn(16, 64, generator=torch.Generator().manual_seed(1)))
    assert (optimizer.state[weight]["remainder"] < 0).any()
    other = torch.nn.Parameter(torch.zeros_like(weight))
    resumed = optimizer_over(other, "split16", backend_name)
    resumed.load_state_dict(optimizer.state_dict())
    stepped(resumed, other, torch.randn(16, 64, generator=torch.Generator().manual_seed(2)))
    assert torch.isfinite(other).all() and (other != 0).float().mean() > 0.99  # a moment may be 0


# --- numbers that no weight should swallow ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7FFF8000])
def test_nan_stays_nan(backend_name: str, pattern: int) -> None:
    """Protects divergence from being hidden: no NaN, that of NVIDIA GPUs among them, is rounded to a weight of 0."""
    nan = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
    for format, state in itertools.product(FORMATS, ("fp32", "bf16")):
        batch, grads, table = build(Case(torch.bfloat16, format, state, "none", torch.float32, ((40, 128), (3, 77))))
        for grad in grads:
            grad[2, 5] = nan
        ops.step(batch, grads, table, backend_name)
        for tensor in batch.tensors:
            weight, exp_avg_sq = tensor.param, tensor.exp_avg_sq
            expected = torch.zeros(weight.shape, dtype=torch.bool)
            expected[2, 5] = True
            assert torch.equal(weight.isnan(), expected) and torch.equal(exp_avg_sq.isnan(), expected), (format, state)


@pytest.mark.parametrize("huge", [3e19, 1e25, 3e38])
def test_huge_gradient_without_a_reduction_leaves_int8_state_finite(backend_name: str, huge: float) -> None:
    """Protects plain AdamW with int8 state: one second moment that leaves fp32 does not make 64 weights NaN."""
    weight = torch.nn.Parameter(torch.randn(40, 150, generator=torch.Generator().manual_seed(0)))
    optimizer = DBAAdamW([weight], lr=1e-3, weight_decay=0.0, state_format="int8", backend=backend_name)
    before = weight.detach().clone()
    for t in range(4):
        grad = torch.randn(40, 150, generator=torch.Generator().manual_seed(1 + t))
        if t == 1:
            grad[3, 5], grad[39, 149] = huge, -huge
        stepped(optimizer, weight, grad)
        assert torch.isfinite(weight).all()
    state = optimizer.state[weight]
    assert torch.isfinite(state["exp_avg_scale"]).all() and torch.isfinite(state["exp_avg_sq_scale"]).all()
    assert (weight - before).abs().max() < 4 * 3.2e-3 and ((weight - before).abs() > 0).all()


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_huge_gradient_is_skipped_by_every_backend(backend_name: str, state: str) -> None:
    """Protects the documented limit: a norm of 1e18 or more is skipped whole, 1e17 is not, whatever the loss scale."""
    stored = GlobalGradient.from_tensors({"w": torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.01})
    cases = ((1e17, 1.0, 0), (1e18, 1.0, 1), (1e25, 1.0, 1), (3e38, 1.0, 1), (1e16, 1e-3, 1))
    for huge, scale, skips in cases[:2] if backend_name == "triton" else cases:
        weight = torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
        optimizer = DBAAdamW(
            [("w", weight)], lr=1e-5, global_gradient=stored, total_steps=1000, state_format=state, backend=backend_name
        )
        optimizer.grad_scale = torch.tensor(scale)
        for t in range(3):
            before = weight.detach().clone()
            grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(2 + t))
            if t == 1:
                grad[3, 5] = huge
            stepped(optimizer, weight, grad)
            assert torch.equal(weight, before) == bool(t == 1 and skips)
        assert optimizer.metrics()["skipped_steps"] == skips
        assert all(torch.isfinite(value.float()).all() for value in optimizer.state[weight].values())


@pytest.mark.parametrize("huge", [1e18, 1e25, float("inf"), float("nan")])
def test_collection_leaves_out_what_a_step_would_skip(backend_name: str, huge: float) -> None:
    """Protects one rule for both: such a gradient adds nothing to the sum, and its norm says so."""
    totals, grads = [torch.ones(40, 128), torch.ones(9)], [torch.ones(40, 128), torch.ones(9)]
    grads[0][3, 5] = huge
    norms = torch.zeros(2, dtype=torch.float64)
    ops.accumulate(totals, grads, 2.0, norms, backend_name)
    assert torch.equal(totals[0], torch.ones(40, 128)) and torch.equal(totals[1], torch.full((9,), 3.0))
    assert norms.tolist() == [float("inf"), 9.0]

"""Schedules: γ_t (eq. 2) and η_t (eq. 6) against exact rational arithmetic, and the torch scheduler as a drop-in."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from dba_kernels.reference import coefficients
from dba_kernels.schedule import annealing_factor, annealing_schedule, gamma, initial_boost
from dba_kernels.stepdata import StepSettings


def exact_gamma(t: int, total: int, boost: Fraction, boost_max: Fraction) -> float:
    """eq. 2 in rationals, the clamp written as cases."""
    value = boost * (total - t) / total
    if value < 0:
        return 0.0
    return float(boost_max if value > boost_max else value)


def tensor_gamma(step: int, total_steps: int, boost: float, boost_max: float = 1.0) -> float:
    """γ as the optimizer's coefficients compute it, on the device from its own count."""
    settings = StepSettings(boost=boost, total_steps=total_steps, boost_max=boost_max)
    return coefficients.gamma(torch.tensor(step), settings).item()


def check_gamma(function: Callable[..., float]) -> None:
    """The paper's and given boost, two clamps, from before the clamp to after the end."""
    for total in (1, 7, 40, 199, 200, 400, 1000, 20_000):
        for t in sorted({0, 1, total // 3, total // 2, total - 1, total, total + 1, 3 * total}):
            for boost in (200 / total, 0.3, 2.0, 0.0):
                for boost_max in (0.5, 1.0):
                    expected = exact_gamma(t, total, Fraction(boost), Fraction(boost_max))
                    assert function(t, total, boost, boost_max) == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("function", [gamma, tensor_gamma])
def test_gamma_is_eq_2(function: Callable[..., float]) -> None:
    """Protects eq. 2 and its clamp, in the scalar schedule and in the reduction's coefficients."""
    check_gamma(function)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, T, k0, top: gamma(t + 1, T, k0, top),  # counts from 1
        lambda t, T, k0, top: k0 * (1 - t / T),  # no clamp
        lambda t, T, k0, top: gamma(t, T, k0, 1.0),  # clamp at 1
        lambda t, T, k0, top: gamma(t, max(T - 1, 1), k0, top),  # reaches 0 one step early
        lambda t, T, k0, top: gamma(t, T, k0 / 2, top),  # half the boost
        lambda t, T, k0, top: gamma(t % T, T, k0, top),  # starts again after T
    ],
)
def test_wrong_gamma_is_noticed(wrong: Callable[..., float]) -> None:
    """Negative control for eq. 2."""
    with pytest.raises(AssertionError):
        check_gamma(wrong)


@pytest.mark.parametrize("total", [400, 1000, 5000, 100_000])
def test_the_papers_total_boost_is_constant(total: int) -> None:
    """Protects Σγ_t ≈ 100 whatever T is: 100 + 100/T exactly."""
    k0 = initial_boost("paper", total, 1e-5)
    assert math.fsum(gamma(t, total, k0) for t in range(total)) == pytest.approx(100 + 100 / total, rel=1e-12)


def test_short_runs_are_clamped() -> None:
    """Protects short runs: unclamped, T < 200 would give γ_0 > 1 and flip the sign of the domain gradient."""
    for total in (1, 40, 199):
        k0 = initial_boost("paper", total, 1e-5)
        assert k0 > 1.0
        gammas = [gamma(t, total, k0, 0.5) for t in range(total)]
        assert max(gammas) == 0.5 and min(gammas) > 0.0
    assert sum(gamma(t, 40, 5.0, 0.5) > 0.5 - 1e-12 for t in range(40)) == 37  # 5 · (1 − t/40) ≥ ½ up to t = 36


def check_auto(function: Callable[[str, int, float], float]) -> None:
    """The smallest of three: 200/T, 0.003/(η₀ T) and 0.5, each where it binds; no division by a rate of 0."""
    cases = {(100, 1e-5): 0.5, (399, 1e-5): 0.5, (500, 1e-5): 0.4, (4000, 1e-5): 0.05, (150, 3e-5): 0.5}
    cases |= {(400, 3e-5): 0.25, (200, 1e-4): 0.15, (200, 3e-4): 0.05, (1000, 3e-4): 0.01, (500, 0.0): 0.4}
    for (total, lr), expected in cases.items():
        assert function("auto", total, lr) == pytest.approx(expected, rel=1e-14)
        assert function("paper", total, lr) == pytest.approx(200 / total, rel=1e-14)


def test_auto_boost_follows_the_learning_rate() -> None:
    """Protects the default: the paper's k₀, less in short runs and at learning rates at which ĝ_G soon goes stale."""
    check_auto(initial_boost)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rule, T, lr: 200 / T,  # the paper's under either name
        lambda rule, T, lr: min(200 / T, 0.5) if rule == "auto" else 200 / T,  # whatever the rate
        lambda rule, T, lr: min(200, 0.003 / max(lr, 1e-9)) / T if rule == "auto" else 200 / T,  # above ½
        lambda rule, T, lr: min(200 / T, 0.5, 1.5e-5 / max(lr, 1e-9)) if rule == "auto" else 200 / T,  # whatever T
        lambda rule, T, lr: initial_boost("auto", T, lr),  # the paper's bounded too
        lambda rule, T, lr: initial_boost(rule, T, 2 * lr),
    ],
)
def test_a_wrong_auto_boost_is_noticed(wrong: Callable[[str, int, float], float]) -> None:
    """Negative control for the default boost."""
    with pytest.raises(AssertionError):
        check_auto(wrong)


def test_gamma_ends() -> None:
    """Protects runs that go on after T: γ is exactly 0 from step T on, and without a total there is no boost."""
    for t in (1000, 1001, 10**9):
        assert gamma(t, 1000, 0.2) == tensor_gamma(t, 1000, 0.2) == 0.0
    assert coefficients.gamma(torch.tensor(3), StepSettings(boost=1.0, total_steps=0)).item() == 0.0


def check_annealing(function: Callable[..., float]) -> None:
    """eq. 6 with and without warm-up, in rationals; the cosine by its three known points and its symmetry."""
    for total in (1, 2, 10, 1000):
        for t in {0, total // 2, total - 1, total, total + 5}:
            expected = max(Fraction(total - t, total), Fraction(0))
            assert function(t, total, 0, "linear") == pytest.approx(float(expected), abs=1e-15)
    for warmup in (1, 4, 9):
        for t in range(12):
            expected = Fraction(t + 1, warmup + 1) if t < warmup else Fraction(max(10 - t, 0), 10 - warmup)
            assert function(t, 10, warmup, "linear") == pytest.approx(float(expected), abs=1e-15)
    for t, expected in ((0, 1.0), (5, 0.5), (10, 0.0), (11, 0.0)):
        assert function(t, 10, 0, "cosine") == pytest.approx(expected, abs=1e-15)
    for t in range(11):
        assert function(t, 10, 0, "cosine") + function(10 - t, 10, 0, "cosine") == pytest.approx(1.0, abs=1e-15)
    assert {function(t, 10, 0, "constant") for t in range(15)} == {1.0}
    assert [function(t, 10, 2, "constant") for t in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_annealing_is_eq_6() -> None:
    """Protects eq. 6 (ours: linear to 0 at T), the warm-up in front of it and the two other shapes."""
    check_annealing(annealing_factor)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, T, W, shape: annealing_factor(t + 1, T, W, shape),
        lambda t, T, W, shape: annealing_factor(t, T + 1, W, shape),
        lambda t, T, W, shape: annealing_factor(t, T, 0, shape),
        lambda t, T, W, shape: annealing_factor(t, T, W, "linear"),
        lambda t, T, W, shape: t / W if t < W else annealing_factor(t, T, W, shape),  # begins at 0
    ],
)
def test_wrong_annealing_is_noticed(wrong: Callable[..., float]) -> None:
    """Negative control for eq. 6."""
    with pytest.raises(AssertionError):
        check_annealing(wrong)


def test_scheduler_is_drop_in() -> None:
    """Protects use as any torch scheduler: a LambdaLR over several groups, saved and resumed in mid-run."""

    def build() -> tuple[torch.optim.Optimizer, LambdaLR]:
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 2e-6}, {"params": weights[1:]}], lr=1e-6)
        return optimizer, annealing_schedule(optimizer, total_steps=8, warmup_steps=3)

    optimizer, scheduler = build()
    assert isinstance(scheduler, LambdaLR)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
        if len(rates) == 5:
            saved = optimizer.state_dict(), scheduler.state_dict()
    factors = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]
    assert rates == [pytest.approx([2e-6 * f, 1e-6 * f], abs=1e-20) for f in factors]

    optimizer, scheduler = build()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for expected in rates[5:]:
        assert [group["lr"] for group in optimizer.param_groups] == expected
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected at least 1 optimizer step, got 0"),
        ({"total_steps": 5, "warmup_steps": 5}, "warmup_steps: expected 0 <= warmup_steps < total_steps=5, got 5"),
        ({"total_steps": 5, "warmup_steps": -1}, "warmup_steps: expected 0 <= .*got -1"),
        ({"total_steps": 5, "shape": "step"}, "shape: expected one of 'linear', 'cosine', 'constant'; got 'step'"),
    ],
)
def test_bad_schedule_arguments(arguments: dict, message: str) -> None:
    """Protects the errors: they name the argument, what was expected and what it got."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        annealing_schedule(optimizer, **arguments)

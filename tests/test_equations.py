"""The equations of the method: the reference against the float64 oracle, and the reference broken on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dba_kernels.reference import accumulate as accumulate_module
from dba_kernels.reference import coefficients, quantize, similarity
from dba_kernels.reference import step as step_module
from dba_kernels.stepdata import (
    Coefficient,
    Hyper,
    ParamTensors,
    StepOverrides,
    StepScalars,
    StepSettings,
    Summary,
    TensorBatch,
)
from tests.support.broken_reference import CONTROLS, edited
from tests.support.oracle import (
    BUSY,
    FOUND_INF_STEP,
    GROUP_OF,
    GROUPS,
    NAMES,
    NAN_STEP,
    STEPS,
    TOTAL_STEPS,
    Case,
    State,
    gradients,
    oracle,
    rates,
    start,
)


def run_reference(case: Case) -> list[State]:
    """The reference over the same steps. Whatever a step may not read is NaN."""
    start_params, start_global = start()
    params = {name: torch.tensor(value, dtype=case.dtype) for name, value in start_params.items()}
    exp_avgs = {name: torch.zeros_like(param) for name, param in params.items()}
    exp_avg_sqs = {name: torch.zeros_like(param) for name, param in params.items()}
    stored = {name: quantize.encode(torch.tensor(value), "fp32") for name, value in start_global.items()}
    n = len(NAMES)
    norms_sq = [float((start_global[x] ** 2).sum()) if x in start_global else -1.0 for x in NAMES]
    global_sq = torch.tensor(norms_sq, dtype=torch.float64)
    hyper = torch.zeros(len(GROUPS), Hyper.COUNT, dtype=torch.float64)
    for row, group in zip(hyper, GROUPS, strict=True):
        row[Hyper.BETA1], row[Hyper.BETA2] = group["betas"]
        row[Hyper.EPS], row[Hyper.WEIGHT_DECAY] = group["eps"], group["weight_decay"]
        row[Hyper.SIGN] = -1.0 if case.maximize else 1.0
    steps, bias = torch.zeros(n), torch.zeros(n, 2, dtype=torch.float64)
    counters = torch.zeros(2, dtype=torch.int64)
    settings = StepSettings(
        boost=case.boost,
        total_steps=TOTAL_STEPS,
        boost_max=case.boost_max,
        correction=case.correction,
        scope=case.scope,
        bounds=case.bounds,
        max_grad_norm=case.max_grad_norm,
        reduce=True,
    )
    states = []
    for t in range(STEPS):
        grads = {name: torch.tensor(grad, dtype=case.dtype) for name, grad in gradients(case, t).items()}
        batches = []
        for members in ([x for x in grads if x in stored], [x for x in grads if x not in stored]):
            tensors = [
                ParamTensors(
                    NAMES.index(x),
                    params[x],
                    exp_avg=exp_avgs[x],
                    exp_avg_sq=exp_avg_sqs[x],
                    global_grad=stored.get(x),
                )
                for x in members
            ]
            global_format = "fp32" if members and members[0] in stored else "none"
            batch = TensorBatch("native", "fp32", global_format, tensors)
            batches.append((batch, [grads[x] for x in members]))
        sums = torch.full((n, 2), math.nan, dtype=torch.float64)
        table = torch.full((n, Coefficient.COUNT), math.nan, dtype=torch.float64)
        report = torch.full((n, 2), math.nan, dtype=torch.float64)
        summary = torch.full((Summary.COUNT,), math.nan, dtype=torch.float64)
        hyper[:, Hyper.LR] = torch.tensor(rates(t), dtype=torch.float64)
        for batch, batch_grads in batches:
            similarity.similarity(batch, batch_grads, sums)
        tables = StepScalars(
            sums=sums,
            global_sq=global_sq,
            hyper=hyper,
            group=torch.tensor([GROUP_OF[x] for x in NAMES]),
            active=torch.tensor([NAMES.index(x) for x in grads]),
            steps=steps,
            bias_corrections=bias,
            counters=counters,
            coefficients=table,
            report=report,
            summary=summary,
        )
        coefficients.coefficients(
            tables,
            settings,
            StepOverrides(
                loss_scale=None if case.loss_scale is None else torch.tensor(case.loss_scale),
                found_inf=torch.tensor(float(t == FOUND_INF_STEP)),
                gamma=None if case.gamma is None else torch.tensor(case.gamma, dtype=torch.float64),
                alpha=None if case.alphas is None else torch.tensor(case.alphas, dtype=torch.float64),
            ),
        )
        for batch, batch_grads in batches:
            step_module.step(batch, batch_grads, table)
        skipped_now = t in (NAN_STEP, FOUND_INF_STEP)
        states.append(
            State(
                params={x: params[x].double().numpy().copy() for x in NAMES},
                exp_avgs={x: exp_avgs[x].double().numpy().copy() for x in NAMES},
                exp_avg_sqs={x: exp_avg_sqs[x].double().numpy().copy() for x in NAMES},
                steps={x: int(steps[i]) for i, x in enumerate(NAMES)},
                bias_corrections={x: tuple(bias[i].tolist()) for i, x in enumerate(NAMES)},
                done=int(counters[0]),
                skipped=int(counters[1]),
                report={} if skipped_now else {x: tuple(report[NAMES.index(x)].tolist()) for x in grads},
                summary=() if skipped_now else tuple(summary.tolist()),
            )
        )
    return states


def check(case: Case) -> None:
    """Every state of every step agrees: to 1e-12 in fp64, to a few fp32 roundings else."""
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-6
    for t, (got, expected) in enumerate(zip(run_reference(case), oracle(case), strict=True)):
        assert (got.done, got.skipped, got.steps) == (expected.done, expected.skipped, expected.steps), f"step {t}"
        assert got.report.keys() == expected.report.keys(), f"step {t}"
        for part in ("params", "exp_avgs", "exp_avg_sqs", "bias_corrections", "report"):
            for name, value in getattr(expected, part).items():
                np.testing.assert_allclose(
                    getattr(got, part)[name], value, rtol=tolerance, atol=tolerance, err_msg=f"step {t}, {part}[{name}]"
                )
        np.testing.assert_allclose(got.summary, expected.summary, rtol=tolerance, atol=tolerance, err_msg=f"step {t}")


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("correction", ["cosine", "none", "agem", "pcgrad"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_trajectory(
    correction: str, scope: str, maximize: bool, max_grad_norm: float | None, loss_scale: float | None
) -> None:
    """Protects eqs. 2–8, A-GEM, PCGrad, scopes, clipping, maximize, loss scale, skipping and their order, combined."""
    check(Case(correction, scope, max_grad_norm, maximize, loss_scale))


@pytest.mark.parametrize(
    "case",
    [
        replace(BUSY, gamma=0.37),
        replace(BUSY, alphas=(0.5, 9.0, 1.5, 0.0)),
        replace(BUSY, bounds=(0.95, 1.05)),
        replace(BUSY, boost=0.0),
        replace(BUSY, max_grad_norm=1e3),
        replace(BUSY, boost=40.0, boost_max=1.0),
        replace(BUSY, dtype=torch.float32),
        replace(BUSY, dtype=torch.float32, correction="pcgrad", scope="global"),
    ],
    ids=["given γ", "given α", "tight bounds", "no boost", "no clipping needed", "boost 1", "fp32", "fp32 pcgrad"],
)
def test_trajectory_of_options(case: Case) -> None:
    """Protects γ and α given from outside, the clamp of α, boost_max, and the reference's fp32 arithmetic."""
    check(case)


@pytest.mark.parametrize("name", CONTROLS)
def test_broken_reference_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: with one equation, or the order of two operations, wrong, the comparison above fails."""
    case, breaks = CONTROLS[name]
    check(case)
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


def test_harmless_edit_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the negative controls: their machinery alone changes nothing."""
    edited(lambda arguments, rows: None)(monkeypatch)
    check(BUSY)


# --- single equations -------------------------------------------------------------------------------------------------


def check_mean_gradient(mean: Callable[[torch.Tensor, float], torch.Tensor], dtype: torch.dtype) -> None:
    """eq. 1 over 50 micro-batches of unequal weight against exact sums (``math.fsum``)."""
    random = np.random.default_rng(1)
    grads = random.normal(size=(50, 6)).astype(np.float32) + np.float32(0.1)
    weights = random.integers(1, 512, size=50).astype(float)
    total, norms = torch.zeros(6, dtype=dtype), torch.zeros(1, dtype=torch.float64)
    for grad, weight in zip(grads, weights, strict=True):
        accumulate_module.accumulate([total], [torch.from_numpy(grad)], float(weight), norms)
        assert norms.item() == pytest.approx(math.fsum(float(x) ** 2 for x in grad), rel=1e-13)
    s = math.fsum(weights)
    expected = [math.fsum(w * float(x) for w, x in zip(weights, column, strict=True)) / s for column in grads.T]
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(mean(total, s).double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_gradient_is_eq_1(dtype: torch.dtype) -> None:
    """Protects eq. 1: the weighted mean, its sum held in fp32 or fp64. A mean by count, or an EMA's limit, fails."""
    check_mean_gradient(accumulate_module.mean_gradient, dtype)
    for wrong in (lambda total, s: total / 50, lambda total, s: total / (s + 1), lambda total, s: total):
        with pytest.raises(AssertionError):
            check_mean_gradient(wrong, dtype)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_adds_nothing(bad: float) -> None:
    """Protects the sum of eq. 1: a tensor with one bad element contributes nothing at all, and its norm tells."""
    total = torch.tensor([1.0, 2.0, 3.0])
    norm = accumulate_module.accumulate_one(total, torch.tensor([5.0, bad, 5.0]), 2.0)
    assert total.tolist() == [1.0, 2.0, 3.0] and not math.isfinite(norm.item())


def check_cosine(cosine: Callable[..., torch.Tensor]) -> None:
    """eq. 4 on angles known in advance, on every combination of lengths, and with a zero vector on either side."""
    for degrees in (0, 30, 45, 60, 90, 120, 180):
        for length in (1e-12, 1.0, 1e12):
            x, y = (length, 0.0), (math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
            dot, x_sq = x[0] * y[0], length**2
            phi = cosine(*(torch.tensor(value, dtype=torch.float64) for value in (dot, x_sq, math.hypot(*y) ** 2)))
            assert phi.item() == pytest.approx(math.cos(math.radians(degrees)), abs=1e-15)
            assert -1.0 <= phi.item() <= 1.0
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert cosine(zero, zero, one).item() == cosine(zero, one, zero).item() == cosine(zero, zero, zero).item() == 0.0


def test_cosine_is_eq_4() -> None:
    """Protects eq. 4: the cosine itself, never the angle, whatever the lengths; 0 where a norm is 0."""
    check_cosine(coefficients.cosine)
    for wrong in (
        lambda d, g, h: d / (g * h).sqrt(),  # NaN for a zero norm
        lambda d, g, h: coefficients.cosine(d, g, h).acos(),
        lambda d, g, h: coefficients.cosine(d, g, h) ** 2,
        lambda d, g, h: coefficients.cosine(d, g, h) * 1.0001,
    ):
        with pytest.raises(AssertionError):
            check_cosine(wrong)


def test_correction_is_eq_5() -> None:
    """Protects eq. 5 as we read it: larger steps where the gradients differ, clamped to the bounds."""
    phi = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0], dtype=torch.float64)
    assert coefficients.correction(phi, (0.0, 2.0)).tolist() == [2.0, 1.5, 1.0, 0.75, 0.0]
    assert coefficients.correction(phi, (0.5, 1.2)).tolist() == [1.2, 1.2, 1.0, 0.75, 0.5]


@pytest.mark.parametrize("mode", ["agem", "pcgrad"])
def test_projections_do_not_harm(mode: str) -> None:
    """Protects the meaning of the projections: with a conflict the result does not climb the stored task's loss."""
    random = np.random.default_rng(2)
    conflicts = 0
    for _ in range(50):
        g, h = random.normal(size=(2, 6))
        sums = (torch.tensor(float(x), dtype=torch.float64) for x in (g @ h, g @ g, h @ h))
        a, b = (x.item() for x in coefficients.projection_weights(mode, *sums))
        combined = a * g + b * h
        assert combined @ h >= -1e-12
        if g @ h < 0:
            conflicts += 1
            expected = 0.0 if mode == "agem" else h @ h - (g @ h) ** 2 / (g @ g)
            assert combined @ h == pytest.approx(expected, abs=1e-12)
    assert conflicts == 20
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for sums in ((zero, zero, one), (zero, one, zero)):
        assert all(math.isfinite(x.item()) for x in coefficients.projection_weights(mode, *sums))


def coefficients_alone(n_steps: int, betas: tuple[float, float], found_inf: set[int]) -> tuple[torch.Tensor, ...]:
    """One parameter without ĝ_G and without clipping: nothing is reduced, so the sums are NaN and must not be read."""
    hyper = torch.tensor([[1e-3, *betas, 1e-8, 0.5, 1.0]], dtype=torch.float64)
    bias, table = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, Coefficient.COUNT, dtype=torch.float64)
    steps, counters, first = torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.tensor([0])
    for t in range(n_steps):
        tables = StepScalars(
            sums=torch.full((1, 2), math.nan, dtype=torch.float64),
            global_sq=torch.full((1,), -1.0, dtype=torch.float64),
            hyper=hyper,
            group=first,
            active=first,
            steps=steps,
            bias_corrections=bias,
            counters=counters,
            coefficients=table,
            report=torch.zeros(1, 2, dtype=torch.float64),
            summary=torch.zeros(Summary.COUNT, dtype=torch.float64),
        )
        coefficients.coefficients(tables, StepSettings(), StepOverrides(found_inf=torch.tensor(float(t in found_inf))))
    return table[0], bias[0], steps, counters


def test_coefficients_without_global_gradient_are_adamw() -> None:
    """Protects plain AdamW: every column of the table after three steps, without reading sums that do not exist."""
    row, _, _, counters = coefficients_alone(3, (0.9, 0.999), set())
    expected = {
        Coefficient.GRAD_WEIGHT: 1.0,
        Coefficient.GLOBAL_WEIGHT: 0.0,
        Coefficient.BETA1: 0.9,
        Coefficient.ONE_MINUS_BETA1: 0.1,
        Coefficient.BETA2: 0.999,
        Coefficient.ONE_MINUS_BETA2: 0.001,
        Coefficient.STEP_SIZE: 1e-3 / (1 - 0.9**3),
        Coefficient.INV_SQRT_BIAS_CORRECTION2: 1 / math.sqrt(1 - 0.999**3),
        Coefficient.EPS: 1e-8,
        Coefficient.LR_WEIGHT_DECAY: 5e-4,
        Coefficient.STEP: 3.0,
        Coefficient.SKIP: 0.0,
    }
    assert len(expected) == Coefficient.COUNT and counters.tolist() == [3, 0]
    for column, value in expected.items():
        assert row[column].item() == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9999), (0.0, 0.5)])
def test_bias_correction_as_ema(betas: tuple[float, float]) -> None:
    """Protects the bias correction without powers: the EMA of 1 is 1 − β^k, and skipped steps do not count."""
    skipped = set(range(10, 300, 7))
    _, bias, steps, counters = coefficients_alone(300, betas, skipped)
    k = 300 - len(skipped)
    assert int(steps) == k and counters.tolist() == [k, len(skipped)]
    assert bias.tolist() == pytest.approx([1 - beta**k for beta in betas], rel=1e-13)
    if betas[1] > 0.9:  # negative control: had skipped steps counted
        assert bias[1].item() != pytest.approx(1 - betas[1] ** 300, rel=1e-3)

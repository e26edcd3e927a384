"""coefficients: every backend against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dba_kernels.reference import coefficients as reference
from dba_kernels.stepdata import CORRECTIONS, Coefficient, StepScalars

from .support.agreement import ACTIVE, BASE, N, arguments, assert_same_coefficients

VARIANTS = {
    **{
        f"{mode}-{scope}": {"correction": mode, "scope": scope}
        for mode in CORRECTIONS
        for scope in ("tensor", "global")
    },
    "no clip": {"max_grad_norm": None},
    "loose clip": {"max_grad_norm": 1e3},
    "no reduction": {"reduce": False, "correction": "none", "max_grad_norm": None, "boost": 0.0, "total_steps": 0},
    "past the end": {"total_steps": 5},
    "clamped boost": {"boost": 9.0, "boost_max": 0.3},
    "tight bounds": {"bounds": (0.9, 1.1)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_coefficients(backend, name):
    """Protects eqs. 2, 4 and 5: every mode, scope and limit gives the reference's coefficients."""
    assert_same_coefficients(backend.coefficients, dataclasses.replace(BASE, **VARIANTS[name]), arguments())


OPTIONS = {
    "loss scale": {"loss_scale": torch.tensor(1024.0)},
    "found inf": {"loss_scale": torch.tensor(1024.0), "found_inf": torch.tensor(1.0)},
    "found none": {"found_inf": torch.tensor(0.0)},
    "gamma": {"gamma": torch.tensor(0.123)},
    "alpha": {"alpha": torch.linspace(0.2, 1.9, N)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_optional_inputs(backend, name):
    """Protects scalers and callables: loss scale, found_inf, own γ and own α act as in the reference."""
    assert_same_coefficients(backend.coefficients, BASE, arguments(), OPTIONS[name])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_sum_skips(backend, poison):
    """Protects the weights: a sum that is not finite marks every active parameter as skipped, and counts."""
    inputs = arguments()
    inputs["sums"][3, 1] = poison
    assert_same_coefficients(backend.coefficients, BASE, inputs)
    backend.coefficients(StepScalars(**inputs), BASE)
    assert inputs["counters"].tolist() == [11, 3]
    assert inputs["coefficients"][ACTIVE, Coefficient.SKIP].tolist() == [1.0] * len(ACTIVE)


def test_non_finite_sum_of_an_inactive_parameter_is_ignored(backend):
    """Protects the step: what an inactive parameter left in its row does not skip it."""
    inputs = arguments()
    inputs["sums"][1] = float("nan")
    backend.coefficients(StepScalars(**inputs), BASE)
    assert inputs["counters"].tolist() == [12, 2]


def test_more_parameters_than_one_block(backend):
    """Protects large models: more parameters than one block holds, in any order."""
    n = 700
    inputs = {name: tensor.clone() for name, tensor in arguments().items()}
    for name in ("sums", "global_sq", "group", "steps", "bias_corrections", "coefficients", "report"):
        tensor = inputs[name]
        inputs[name] = tensor.repeat(100, *[1] * (tensor.dim() - 1))
    inputs["active"] = torch.arange(n - 1, -1, -1)
    assert_same_coefficients(backend.coefficients, BASE, inputs)


def test_zero_norms_mean_no_correction(backend):
    """Protects eq. 4 at zero: where a norm is 0, φ is 0 and α is 1."""
    inputs = arguments()
    inputs["sums"][5], inputs["global_sq"][0] = 0.0, 0.0
    inputs["sums"][0, 0] = 0.0
    backend.coefficients(StepScalars(**inputs), BASE)
    assert inputs["report"][[5, 0]].tolist() == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"boost": 0.3001},
        {"total_steps": 31},
        {"correction": "none"},
        {"correction": "agem"},
        {"scope": "global"},
        {"bounds": (0.1, 1.3)},
        {"max_grad_norm": 0.3701},
        {"reduce": False},
    ],
    ids=str,
)
def test_control_coefficients(wrong):
    """Negative control: each changed setting is noticed."""
    with pytest.raises(AssertionError):
        assert_same_coefficients(reference.coefficients, BASE, arguments(), **wrong)

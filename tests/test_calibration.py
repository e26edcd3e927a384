"""κ of the curvature: what it measures, and that measuring leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dba_kernels import collect_global_gradient
from dba_kernels.calibration import KEPT, calibrate, keeping
from dba_kernels.factors import Curvature

from .support.linear_maps import Tiny, batches_of, loss_of


class Bowl(nn.Module):
    """A loss that is a quadratic form: L = L₀ + ½ Σ h θ², whose true curvature is h."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(50))
        self.origin = self.weight.detach().clone()
        self.steepness = torch.rand(50) + 0.5

    def forward(self, pull: torch.Tensor) -> torch.Tensor:
        moved = self.weight - self.origin
        return 2.0 + 0.5 * (self.steepness * moved.square()).sum() + (pull * moved).sum() * 1e-3


def loss_on(model: nn.Module) -> Callable:
    return lambda pull: (model(pull), 10)


@pytest.mark.parametrize("factor", [1.0, 0.1, 20.0])
def test_ratio_of_true_to_predicted_rise(factor: float) -> None:
    """Protects κ: 1 where H is the Hessian, and its reciprocal where H is a multiple of it."""
    model = Bowl()
    curvature = Curvature(diagonal=model.steepness * factor)
    batches = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(KEPT)]
    found = calibrate(model, dict(model.named_parameters()), lambda name: curvature, batches, loss_on(model))
    assert found == pytest.approx(1 / factor, rel=0.02)


def test_nothing_to_measure() -> None:
    """Protects flat losses: where no step raises the loss there is no κ, and no curvature predicts no rise."""
    model = Bowl()
    model.steepness.zero_()
    params, batches = dict(model.named_parameters()), [torch.ones(50)] * 4
    assert calibrate(model, params, lambda name: Curvature(diagonal=torch.ones(50)), batches, loss_on(model)) is None
    assert calibrate(model, params, lambda name: None, batches, loss_on(model)) is None


def test_weights_and_modes_are_put_back() -> None:
    """Protects the base model: after a collection with curvature every bit of it is as before, gradients too."""
    model = Tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gg = collect_global_gradient(model, batches_of(), loss_of, curvature=4)
    assert gg.calibration is not None and gg.calibration > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())


def test_an_error_puts_the_weights_back() -> None:
    """Protects them where the loss function fails half-way."""
    model = Bowl()
    before, calls = model.weight.detach().clone(), []

    def failing(pull: torch.Tensor) -> tuple[torch.Tensor, int]:
        calls.append(pull)
        if len(calls) > 7:
            raise RuntimeError("no more")
        return model(pull), 10

    curvature = Curvature(diagonal=model.steepness)
    with pytest.raises(RuntimeError, match="no more"):
        calibrate(model, dict(model.named_parameters()), lambda name: curvature, [torch.ones(50)] * 4, failing)
    assert torch.equal(model.weight, before)


def test_first_batches_are_kept() -> None:
    """Protects a resumed collection: the same batches calibrate it, whatever of them was skipped, and no more than so
    many are held."""
    kept: list[int] = []
    assert list(keeping(range(20), kept)) == list(range(20)) and kept == list(range(KEPT))

"""Nothing in ``step()`` waits for the device, shown on fake CUDA tensors: reading a value from one raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dba_kernels import DBAAdamW, GlobalGradient, plan
from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS

from .support.operations import CountedOperations

SHAPES = {"a.weight": (64, 64), "b.weight": (70, 65), "norm.weight": (64,)}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors on any build of torch.

    A build without CUDA cannot even pretend to copy from the host to it, so the one such copy of a step, of the
    hyperparameters (a fresh pinned buffer, non-blocking), is left out here.
    """
    monkeypatch.setattr(plan.Plan, "upload_hyper", lambda self, groups: None)


def run(steps: int = 3, found_inf: bool = False, **options) -> DBAAdamW:
    gg = options.pop("global_gradient", None) or GlobalGradient.from_tensors(
        {name: torch.randn(shape) for name, shape in SHAPES.items()}
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=torch.bfloat16))
            for name, shape in SHAPES.items()
        }
        optimizer = DBAAdamW(params.items(), lr=1e-5, global_gradient=gg, total_steps=1000, backend="triton", **options)
        if found_inf:  # as GradScaler hands them over
            optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.grad_scale = torch.ones((), device="cuda")
        for _ in range(steps):
            for param in params.values():
                param.grad = torch.empty_like(param)
            optimizer.step()
        return optimizer


@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("param_format", PARAM_FORMATS)
def test_no_format_synchronises(fake_cuda: None, state_format: str, param_format: str) -> None:
    """Protects the overlap with the GPU: no pair of formats reads a value back in a step."""
    run(state_format=state_format, param_format=param_format, max_grad_norm=1.0)


def test_a_step_is_three_operations(fake_cuda: None) -> None:
    """From the second step on: no allocation, no copy, nothing of torch's own on the device."""
    optimizer = run(state_format="int8", max_grad_norm=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True), CountedOperations() as counted:
        optimizer.step()
    per_batch = len(optimizer._plan.last.parts)
    assert per_batch == 2  # the norm keeps fp32 state
    assert counted.names == [
        *["dba_kernels.similarity.default"] * per_batch,
        "dba_kernels.coefficients.default",
        *["dba_kernels.step.default"] * per_batch,
    ]


def test_grad_scaler_does_not_synchronise(fake_cuda: None) -> None:
    """fp16's loss scale and found_inf stay on the device."""
    run(found_inf=True, max_grad_norm=1.0)


def test_functions_do_not_synchronise(fake_cuda: None) -> None:
    """Boost and correction given as functions of tensors."""
    run(boost=lambda t, total: 0.2 * (1 - t / total), correction=lambda dot, g, gg: 1 - dot / (g * gg).sqrt())


@pytest.mark.parametrize(
    "reads",
    [
        lambda optimizer: optimizer.metrics(),
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: float(next(iter(optimizer.state.values()))["step"]),
    ],
    ids=["metrics", "state_dict", "step"],
)
def test_reading_a_value_is_noticed(fake_cuda: None, reads: Callable[[DBAAdamW], object]) -> None:
    """Negative control: what does wait for the device raises here."""
    optimizer = run()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((DataDependentOutputException, RuntimeError)):
        reads(optimizer)


def test_a_boost_that_reads_its_step_is_noticed(fake_cuda: None) -> None:
    """Negative control: a schedule that turns its step into a Python number waits for the device."""
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        run(boost=lambda t, total: 0.2 * (1 - int(t) / total))

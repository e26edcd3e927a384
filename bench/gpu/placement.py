"""Tensors in unusual places: CPU beside GPU, another default device, sets that alternate, storage that is not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient, collect_global_gradient, plan

from .device import DEVICE

if TYPE_CHECKING:
    from .report import Report

SHAPES = {"a.weight": (64, 64), "b.weight": (40, 77), "norm.weight": (96,), "c.weight": (64, 65)}


def normal(shape: tuple[int, ...], seed: int, scale: float = 0.05) -> torch.Tensor:
    """The same values on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale


def make(
    devices: dict[str, Any], backend: str = "auto", **options: Any
) -> tuple[dict[str, torch.nn.Parameter], DBAAdamW]:
    params = {n: torch.nn.Parameter(normal(s, k).to(devices[n])) for k, (n, s) in enumerate(SHAPES.items())}
    gg = GlobalGradient.from_tensors({n: normal(s, 50 + k) for k, (n, s) in enumerate(SHAPES.items())}, format="fp32")
    options = {"lr": 1e-3, "total_steps": 50, "max_grad_norm": 1.0} | options
    return params, DBAAdamW(params.items(), global_gradient=gg, backend=backend, **options)


def step(params: dict[str, torch.nn.Parameter], optimizer: DBAAdamW, seed: int, names: Any = None) -> None:
    for k, (name, param) in enumerate(params.items()):
        param.grad = (
            None if names is not None and name not in names else normal(SHAPES[name], seed + k).to(param.device)
        )
    optimizer.step()


def check_several_devices(scaled: bool) -> None:
    """CUDA and CPU parameters in one optimizer move as they do on one device; with a GradScaler's tensors too."""
    first = "c.weight"
    for cpu in (["b.weight"], list(SHAPES)[:1]):  # the plan lies on the first parameter's device: either way round
        mixed = make({name: "cpu" if name in cpu else DEVICE for name in SHAPES})
        plain = make(dict.fromkeys(SHAPES, "cpu"), backend="reference")
        for t in range(5):
            for params, optimizer in (mixed, plain):
                if scaled:  # where the loss is
                    optimizer.grad_scale = torch.full((), 4.0, device=params[first].device)
                    optimizer.found_inf = torch.full((), float(t == 2), device=params[first].device)
                step(params, optimizer, 100 * t)
        for name, param in mixed[0].items():
            torch.testing.assert_close(param.detach().cpu(), plain[0][name].detach(), rtol=1e-5, atol=1e-6, msg=name)
        assert mixed[1].metrics()["skipped_steps"] == float(scaled)


def check_moved_model() -> None:
    """State made on the CPU, parameters moved since: refused by name, not an illegal address."""
    if DEVICE.type == "cpu":
        return
    params, optimizer = make(dict.fromkeys(SHAPES, "cpu"), backend="auto")
    step(params, optimizer, 0)
    for param in params.values():
        param.data, param.grad = param.data.to(DEVICE), None
    refused("exp_avg", lambda: step(params, optimizer, 1))


def refused(word: str, job: Any) -> None:
    try:
        job()
    except ValueError as error:
        assert word in str(error), f"the error does not name {word!r}: {error}"
        return
    raise AssertionError(f"expected a ValueError that names {word!r}")


def check_no_storage() -> None:
    """Tensors that wrap others have no address of their own: refused, naming the parameter."""
    from torch.testing._internal.two_tensor import TwoTensor

    def wrapped() -> torch.Tensor:
        return TwoTensor(torch.randn(64, 64, device=DEVICE), torch.randn(64, 64, device=DEVICE))

    weight = torch.nn.Parameter(wrapped())
    weight.grad = wrapped()
    refused("weight", lambda: DBAAdamW([("odd.weight", weight)]).step())
    plain = torch.nn.Parameter(torch.randn(64, 64, device=DEVICE))
    plain.grad = wrapped()
    refused("weight", lambda: DBAAdamW([("odd.weight", plain)]).step())


@contextmanager
def default_device(device: Any) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def check_default_device(device: Any) -> None:
    """Collect, save, load and step under a default device that is not the CPU."""
    with tempfile.TemporaryDirectory() as folder, default_device(device):
        model = torch.nn.Linear(64, 64, device=DEVICE)
        batches = [normal((4, 64), k).to(DEVICE) for k in range(3)]
        gg = collect_global_gradient(model, batches, loss_fn=lambda m, b: m(b).square().mean(), format="int8")
        path = Path(folder) / "gg.safetensors"
        gg.save(path)
        options: dict[str, Any] = {
            "global_gradient": GlobalGradient.load(path),
            "total_steps": 10,
            "state_format": "int8",
        }
        optimizer = DBAAdamW(model.named_parameters(), lr=1e-4, max_grad_norm=1.0, **options)
        before = model.weight.detach().clone()
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert not torch.equal(before, model.weight.detach()), "nothing moved"


def check_alternating_sets() -> dict[str, int]:
    """A model that alternates between sets of parameters with a gradient makes one plan."""
    made: list[Any] = []
    original = plan.Plan.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(self)
        original(self, *arguments, **options)

    params, optimizer = make(dict.fromkeys(SHAPES, DEVICE))
    sets = [("a.weight", "norm.weight"), ("b.weight", "norm.weight"), tuple(SHAPES)]
    plan.Plan.__init__ = counted  # type: ignore[method-assign]
    try:
        for t in range(9):
            step(params, optimizer, t, sets[t % 3])
    finally:
        plan.Plan.__init__ = original  # type: ignore[method-assign]
    assert len(made) == 1, f"{len(made)} plans in nine steps over three sets"
    return {"plans": len(made)}


def run(report: Report) -> None:
    report.attempt("CPU and GPU parameters together", check_several_devices, False)
    report.attempt("CPU and GPU parameters together, GradScaler", check_several_devices, True)
    report.attempt("a model that was moved", check_moved_model)
    report.attempt("tensors without storage", check_no_storage)
    for device in (DEVICE, "meta"):
        report.attempt(f"default device {device}", check_default_device, device)
    report.attempt("alternating sets", check_alternating_sets)

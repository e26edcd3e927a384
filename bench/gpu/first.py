"""Does anything run at all: one step of the optimizer, seconds after the start of a process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient, collect_global_gradient
from dba_kernels.backends import select

from .device import DEVICE, synchronize

if TYPE_CHECKING:
    from .report import Report


def check_backend() -> None:
    for backend in ("auto", "triton"):
        chosen = select(backend, DEVICE, torch.float32)
        assert chosen == "triton" or DEVICE.type == "cpu", f"backend {backend!r} on {DEVICE}: got {chosen!r}"


def check_step() -> dict[str, Any]:
    """A linear layer learns; how long the first step takes, compilation included."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64).to(DEVICE, torch.bfloat16)
    gg = GlobalGradient.from_tensors({n: torch.randn_like(p, dtype=torch.float32) for n, p in model.named_parameters()})
    optimizer = DBAAdamW(
        model.named_parameters(), lr=1e-2, global_gradient=gg, total_steps=20, state_format="int8", backend="triton"
    )
    inputs, seconds, losses = torch.randn(32, 128, device=DEVICE, dtype=torch.bfloat16), [], []
    for _ in range(4):
        loss = (model(inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        synchronize()
        seconds.append(round(time.perf_counter() - start, 4))
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    return {"losses": losses, "seconds of each step": seconds, **optimizer.metrics()}


def check_collection() -> None:
    """Stage 1 on the device: the mean gradient of three batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64).to(DEVICE)
    batches = [torch.randn(8, 128, device=DEVICE) for _ in range(3)]

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    gg = collect_global_gradient(model, batches, loss_fn=loss, format="fp32")
    wanted = [torch.autograd.grad(loss(model, batch), list(model.parameters())) for batch in batches]
    for k, (name, _) in enumerate(model.named_parameters()):
        mean = torch.stack([grads[k] for grads in wanted]).double().mean(0).to("cpu")
        torch.testing.assert_close(gg[name].double().to("cpu"), mean, rtol=1e-5, atol=1e-7)


def run(report: Report) -> None:
    report.attempt("backend", check_backend)
    report.attempt("a few steps", check_step)
    report.attempt("collection", check_collection)

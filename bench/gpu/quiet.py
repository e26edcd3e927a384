"""What a step must not do: wait for the device, allocate, keep more bytes than were promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient, annealing_schedule

from .device import DEVICE, SIMULATED, free_memory, synchronize

if TYPE_CHECKING:
    from .report import Report

SHAPES = {"a.weight": (64, 64), "b.weight": (70, 65), "norm.weight": (64,)}
ROWS = 64 if SIMULATED else 8192
PROMISED = {
    "split8, int8 states, int4 global gradient": (8.2, {"param_format": "split8"}, "int4"),
    "split16, int8 states, int4 global gradient": (9.2, {"param_format": "split16"}, "int4"),
}
"""Bytes per parameter that live between steps, gradients included."""


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    if SIMULATED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], stored: str = "int8", **options: Any) -> DBAAdamW:
    params = {
        name: torch.nn.Parameter((torch.randn(shape, device=DEVICE) * 0.05).to(dtype)) for name, shape in shapes.items()
    }
    for param in params.values():
        param.grad = torch.randn_like(param) * 1e-3
    gg = GlobalGradient.from_tensors({name: p.grad.float() for name, p in params.items()}, format=stored)  # type: ignore[union-attr]
    options = {
        "state_format": "int8",
        "max_grad_norm": 1.0,
        "backend": "triton",
        "total_steps": 100,
        "lr": 1e-5,
    } | options
    return DBAAdamW(params.items(), global_gradient=gg, **options)


def params_of(optimizer: DBAAdamW) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def check_scheduler(**options: Any) -> None:
    """From the second step on: rates that change, gradients that move, some that are missing."""
    optimizer = training(torch.bfloat16, SHAPES, **options)
    schedule = annealing_schedule(optimizer, total_steps=100)
    params = params_of(optimizer)
    kept = [param.grad for param in params]
    for step in range(6):
        with no_waiting() if step else contextlib.nullcontext():
            optimizer.step()
            schedule.step()
            for param in params:
                param.grad = torch.full_like(param, 1e-3)
            if step == 2:
                params[1].grad = None
            elif step == 4:
                for param, grad in zip(params, kept, strict=True):
                    param.grad = grad


def check_scaler() -> None:
    """fp16 under a GradScaler, which hands its scale and found_inf over."""
    optimizer = training(torch.float16, SHAPES)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    for step in range(5):
        with no_waiting() if step > 1 else contextlib.nullcontext():
            loss = sum((param.float() * 1e-3).sum() for param in params_of(optimizer))
            assert isinstance(loss, torch.Tensor)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert optimizer.metrics()["steps"] == 5


def check_control() -> None:
    """Negative control: reading a value back is noticed."""
    optimizer = training(torch.bfloat16, SHAPES)
    optimizer.step()
    if SIMULATED:
        return
    try:
        with no_waiting():
            optimizer.metrics()
    except RuntimeError:
        return
    raise AssertionError("metrics() waits for the device and was not noticed")


def allocations() -> int:
    return 0 if SIMULATED else torch.cuda.memory_stats()["allocation.all.allocated"]


def check_allocations(**options: Any) -> dict[str, int]:
    """The second step allocates nothing on the device; the first one is counted, so that the count is seen to work."""
    before = allocations()
    optimizer = training(torch.bfloat16, SHAPES, **options)
    optimizer.step()
    first = allocations()
    optimizer.step()
    second = allocations() - first
    assert second == 0, f"the second step made {second} allocations"
    assert SIMULATED or first > before
    return {"to the end of the first step": first - before, "second step": second}


def check_bytes(promised: float, options: dict[str, Any], stored: str) -> dict[str, float]:
    """Live bytes per parameter between steps, as the allocator counts them."""
    free_memory()
    before = 0 if SIMULATED else torch.cuda.memory_allocated()
    optimizer = training(torch.bfloat16, {"a.weight": (ROWS, 4096), "b.weight": (ROWS, 2048)}, stored, **options)
    numel = sum(param.numel() for param in params_of(optimizer))
    if SIMULATED:
        return {"parameters": numel}
    optimizer.step()
    synchronize()
    live, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    found = {"parameters": numel, "live": live / numel, "peak": peak / numel, "promised": promised}
    assert live / numel <= promised, f"{live / numel:.3f} bytes per parameter live, {promised} promised"
    return found


def run(report: Report) -> None:
    report.attempt("control", check_control)
    report.attempt("no waiting: scheduler, moved and missing gradients", check_scheduler)
    report.attempt("no waiting: split8", lambda: check_scheduler(param_format="split8"))
    report.attempt("no waiting: functions of tensors", lambda: check_scheduler(boost=_boost, correction=_correction))
    report.attempt("no waiting: GradScaler", check_scaler)
    report.attempt("allocations", check_allocations)
    report.attempt("allocations, split8", lambda: check_allocations(param_format="split8"))
    for name, (promised, options, stored) in PROMISED.items():
        report.attempt(f"bytes: {name}", check_bytes, promised, options, stored)


def _boost(step: torch.Tensor, total: int) -> torch.Tensor:
    return 0.2 * (1 - step / total)


def _correction(dot: torch.Tensor, grad_sq: torch.Tensor, global_sq: torch.Tensor) -> torch.Tensor:
    return 1 - dot / (grad_sq * global_sq).sqrt()

"""Whole optimizer steps: host time of the call, device time of queued steps, of a replayed graph; ours and others'."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS, STORAGE_FORMATS

from .device import DEVICE, SIMULATED, device_seconds, free_memory, generator, host_seconds, synchronize

if TYPE_CHECKING:
    from .report import Report

LR = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16
Shapes = list[tuple[int, ...]]


def smollm2() -> Shapes:
    """SmolLM2-135M's tensors: 30 layers, tied embeddings."""
    layer: Shapes = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
        (576,),
        (576,),
    ]
    return [(49152, 576), *layer * 30, (576,)]


SHAPES: dict[str, Shapes] = {
    "SmolLM2-135M": smollm2(),
    "many small": [(256, 256)] * 300,
    "few large": [(8192, 4096)] * 4,
    "tiny": [(64,)] * 3000,
}
if SIMULATED:
    SHAPES = {"SmolLM2-135M": [(64, 64), (64,)], "many small": [(64, 64)] * 2}


class Model:
    """Named parameters with gradients; nothing else of a model. ``off``: gradients are views into one flat buffer,
    that many elements past an aligned address, as DDP's and FSDP2's are."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, off: int | None = None):
        draw = generator(0)
        self.params = []
        flat = torch.empty(sum(map(math.prod, shapes)) + (off or 0), dtype=dtype, device=DEVICE)
        flat.normal_(generator=draw).mul_(1e-3)
        at = off or 0
        for shape in shapes:
            param = torch.nn.Parameter(
                torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=draw).mul_(0.02)
            )
            grad = flat[at : at + param.numel()].view(shape)
            param.grad = grad.clone() if off is None else grad
            at += param.numel()
            self.params.append(param)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"layers.{i}.weight", param) for i, param in enumerate(self.params)]


@dataclass(frozen=True)
class Contender:
    """dtype of parameters and gradients, how a model's step is made, bytes per parameter where they are known."""

    dtype: torch.dtype
    build: Callable[[Model], Callable[[], Any]]
    bytes_per_parameter: float | None = None
    graph: bool = False


def ours(dtype: torch.dtype, state: str, kind: str, stored: str | None, rank: int | None = None) -> Contender:
    def build(model: Model) -> Callable[[], Any]:
        options: dict[str, Any] = {"state_format": state, "param_format": kind, "backend": "triton", "lr": LR}
        if stored is not None:
            dense = {name: p.detach().float() for name, p in model.named()}
            options |= {"global_gradient": GlobalGradient.from_tensors(dense, format=stored, rank=rank)}
            options |= {"total_steps": 10_000}
        return DBAAdamW(model.named(), **options).step

    return Contender(dtype, build, None if rank else whole_step(dtype, state, kind, stored), graph=True)


def whole_step(dtype: torch.dtype, state: str, kind: str, stored: str | None) -> float:
    """Bytes per parameter of the reduction and the update; gradients of the parameter's dtype."""
    kept = dtype.itemsize + PARAM_FORMATS[kind].bytes_per_parameter + STATE_FORMATS[state].bytes_per_parameter
    update = 2 * kept + dtype.itemsize
    if stored is None:
        return update
    return update + dtype.itemsize + 2 * STORAGE_FORMATS[stored].bytes_per_parameter


def torch_adamw(dtype: torch.dtype, **options: Any) -> Contender:
    build = lambda model: torch.optim.AdamW(model.params, lr=LR, **options).step  # noqa: E731
    return Contender(dtype, build, 7 * dtype.itemsize, graph=False)


def by_hand(model: Model) -> Callable[[], Any]:
    """What torch needs for the same method in fp32: clip, dot, boost, fused AdamW; 60 bytes per parameter."""
    optimizer = torch.optim.AdamW(model.params, lr=LR, fused=True)
    stored = [param.detach() * 1e-2 for param in model.params]
    grads = [param.grad for param in model.params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.params, 1.0, foreach=True)
        torch._foreach_norm(torch._foreach_mul(grads, stored), 1)
        torch._foreach_lerp_(grads, stored, 1e-3)
        optimizer.step()

    return step


CONTENDERS: dict[str, Contender] = {
    "torch AdamW fused, fp32": torch_adamw(FP32, fused=True),
    "torch AdamW fused, bf16": torch_adamw(BF16, fused=True),
    "torch fused + clip + lerp + dot, fp32": Contender(FP32, by_hand, 60.0),
    "torch AdamW foreach, fp32": torch_adamw(FP32, foreach=True),
    "DBA fp32, int8 gg": ours(FP32, "fp32", "native", "int8"),
    "AdamW fp32 (dba_kernels)": ours(FP32, "fp32", "native", None),
    "DBA split16, int8 state, int8 gg": ours(BF16, "int8", "split16", "int8"),
    "DBA split8, int8 state, int4 gg": ours(BF16, "int8", "split8", "int4"),
    "8-bit AdamW split8 (dba_kernels)": ours(BF16, "int8", "split8", None),
}
BASELINE = "torch AdamW fused, fp32"
PEERS = {
    "bitsandbytes AdamW, 8-bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW, 8-bit": ("torchao.optim", "AdamW8bit"),
    "FlashOptim AdamW, 8-bit": ("flashoptim", "FlashAdamW"),
}


def check(contender: Contender, shapes: Shapes, off: int | None = None) -> dict[str, float]:
    """One contender on one list of shapes. Device time includes gaps where the host is the slower one."""
    free_memory()
    model = Model(shapes, contender.dtype, off)
    numel = sum(param.numel() for param in model.params)
    step = contender.build(model)
    for _ in range(3):
        step()
    synchronize()
    found = {"parameters": numel, "tensors": len(shapes), "host us": 1e6 * host_seconds(step, 1 if SIMULATED else 20)}
    seconds = device_seconds(step)
    found["device us"] = 1e6 * seconds
    if contender.graph and not SIMULATED:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        seconds = device_seconds(graph.replay)
        found["graph us"] = 1e6 * seconds
    if contender.bytes_per_parameter:
        found["GB/s"] = contender.bytes_per_parameter * numel / seconds / 1e9
    return found


def run(report: Report) -> None:
    """The most telling rows first; every shape has torch's fused AdamW in the same run."""
    chosen = dict(list(CONTENDERS.items())[::3]) if SIMULATED else CONTENDERS
    for shape_name, shapes in SHAPES.items():
        for name, contender in chosen.items():
            report.attempt(f"{shape_name}: {name}", check, contender, shapes)
    shapes = SHAPES["SmolLM2-135M"]
    for off in (1, 4):  # bf16: 2 and 8 bytes past an aligned address
        for name in list(CONTENDERS)[6:7] if SIMULATED else list(CONTENDERS)[6:]:
            report.attempt(f"SmolLM2-135M, gradients {off} elements off: {name}", check, CONTENDERS[name], shapes, off)
    low_rank = ours(BF16, "int8", "split16", "bf16", rank=8 if SIMULATED else 64)
    report.attempt("SmolLM2-135M: DBA split16, int8 state, low rank", check, low_rank, shapes)


def check_peer(module: str, attribute: str, shapes: Shapes) -> dict[str, float]:
    from .report import Absent

    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise Absent(f"{module} cannot be imported: {type(error).__name__}") from error
    try:
        return check(Contender(BF16, lambda model: kind(model.params, lr=LR).step), shapes)
    except Exception as error:  # a peer that fails here is no failure of ours
        raise Absent(f"{type(error).__name__}: {error}"[:300]) from error


def peers(report: Report) -> None:
    for name, (module, attribute) in PEERS.items():
        for shape_name in list(SHAPES)[:3]:
            report.attempt(f"{shape_name}: {name}", check_peer, module, attribute, SHAPES[shape_name])

"""Time of a whole optimizer step on the CPU.

``python -m bench.bench_step`` prints the table; ``pytest bench`` a short one.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import pytest
import torch

from dba_kernels.formats import GROUP, PARAM_FORMATS, STATE_FORMATS, is_compressible
from dba_kernels.native import quantize, step
from dba_kernels.stepdata import Coefficient, Hyper, ParamTensors, StepScalars, StepSettings, Summary, TensorBatch

from .harness import Clock, Comparison, compare, machine_load
from .triad import triad

Shapes = list[tuple[int, ...]]
Step = Callable[[], object]
BF16 = torch.bfloat16


def smollm2_shapes() -> Shapes:
    """The 272 parameters of SmolLM2-135M: hidden 576, 30 layers, 9 + 3 heads of 64, ffn 1536, tied embeddings."""
    hidden, kv, ffn = 576, 192, 1536
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer += [(ffn, hidden), (ffn, hidden), (hidden, ffn), (hidden,), (hidden,)]
    return [(49152, hidden), *(layer * 30), (hidden,)]


MODELS: dict[str, Shapes] = {
    "50M": [(1024, 1024)] * 46 + [(1024, 853), (853, 1024)],
    "SmolLM2-135M": smollm2_shapes(),
    "many small": [(16, 16)] * 3000,
}


def numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def fresh_tables(hyper: torch.Tensor, group: torch.Tensor, global_sq: torch.Tensor) -> StepScalars:
    """Tables as before the first step, every parameter active."""
    n, wide = len(group), torch.float64
    return StepScalars(
        sums=torch.zeros(n, 2, dtype=wide),
        global_sq=global_sq,
        hyper=hyper,
        group=group,
        active=torch.arange(n),
        steps=torch.zeros(n),
        bias_corrections=torch.zeros(n, 2, dtype=wide),
        counters=torch.zeros(2, dtype=torch.int64),
        coefficients=torch.zeros(n, Coefficient.COUNT, dtype=wide),
        report=torch.zeros(n, 2, dtype=wide),
        summary=torch.zeros(Summary.COUNT, dtype=wide),
    )


class NativeModel:
    """Random parameters, state, gradients and stored global gradients, stepped by the native backend in one call."""

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        param_format: str,
        state_format: str,
        global_format: str,
        grad_dtype: torch.dtype = torch.bfloat16,
        max_grad_norm: float | None = None,
    ):
        stored = global_format != "none"
        self.settings = StepSettings(
            *(0.2, 1000, 0.5, "cosine" if stored else "none", "tensor", (0.0, 2.0), max_grad_norm),
            reduce=stored or max_grad_norm is not None,
        )
        n, wide = len(shapes), torch.float64
        self.batches: list[TensorBatch] = []
        self.grads: list[list[torch.Tensor]] = []
        compressible = [i for i, shape in enumerate(shapes) if is_compressible(shape)]
        rest = [i for i, shape in enumerate(shapes) if not is_compressible(shape)]
        for index, state, kept in ((compressible, state_format, global_format), (rest, "fp32", "fp32")):
            if index:
                kept = kept if stored else "none"
                self._add(shapes, index, dtype, param_format, state, kept, grad_dtype)
        hyper = torch.zeros(1, Hyper.COUNT, dtype=wide)
        hyper[0] = torch.tensor([1e-5, 0.9, 0.999, 1e-8, 1e-2, 1.0])
        self.tables = fresh_tables(
            hyper, torch.zeros(n, dtype=torch.int64), torch.full((n,), 1.0 if stored else -1.0, dtype=wide)
        )

    def _add(
        self,
        shapes: Shapes,
        index: list[int],
        dtype: torch.dtype,
        kind: str,
        state: str,
        stored: str,
        grads: torch.dtype,
    ) -> None:
        batch, batch_grads = TensorBatch(kind, state, stored, []), []
        rest = PARAM_FORMATS[kind].remainder
        for i in index:
            shape = shapes[i]
            parts = STATE_FORMATS[state].parts(shape)
            state_tensors = {name: torch.zeros(size, dtype=kept) for name, (size, kept) in parts.items()}
            batch.tensors.append(
                ParamTensors(
                    i,
                    (torch.randn(shape) * 0.02).to(dtype),
                    None if rest is None else torch.zeros(shape, dtype=rest),
                    **state_tensors,
                    global_grad=None if stored == "none" else quantize.encode(torch.randn(shape) * 1e-3, stored),
                    seed=i,
                )
            )
            batch_grads.append((torch.randn(shape) * 1e-3).to(grads))
        self.batches.append(batch)
        self.grads.append(batch_grads)

    def step(self) -> None:
        step.fused_step(self.batches, self.grads, self.tables, self.settings)


def torch_params(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Random parameters with gradients of their own dtype."""
    params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def torch_adamw(shapes: Shapes, **how: bool) -> Step:
    return torch.optim.AdamW(torch_params(shapes), lr=1e-5, weight_decay=1e-2, **how).step


def torch_dba(shapes: Shapes) -> Step:
    """What a user would write: clip_grad_norm_, similarity and boost in torch operations, then torch's fused AdamW."""
    params = torch_params(shapes)
    global_grads = [torch.randn_like(param) * 1e-3 for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=1e-2, fused=True)

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        for param, global_grad in zip(params, global_grads, strict=True):
            torch.dot(param.grad.flatten(), global_grad.flatten())
        torch._foreach_lerp_([param.grad for param in params], global_grads, 1e-6)
        optimizer.step()

    return step


@dataclass(frozen=True)
class Side:
    """One row of the table. ``bytes``: read and written per parameter and step, scales included; 0 where not stated."""

    name: str
    bytes: float
    make: Callable[[], Step]


SCALES = 4 / GROUP  # one fp32 scale per group
NATIVE = {
    "native plain AdamW, fp32": (28, (torch.float32, "native", "fp32", "none", torch.float32)),
    "native DBA, fp32, bf16 g, int8 gG": (30 + 2 * SCALES, (torch.float32, "native", "fp32", "int8")),
    "native DBA, fp32, bf16 g, int8 gG, clip": (30 + 2 * SCALES, (torch.float32, "native", "fp32", "int8", BF16, 1e9)),
    "native DBA, bf16 split16, int8 states, int8 gG": (18 + 6 * SCALES, (BF16, "split16", "int8", "int8")),
    "native DBA, bf16 split8, int8 states, int8 gG": (16 + 6 * SCALES, (BF16, "split8", "int8", "int8")),
    "native DBA, bf16 split8, int8 states, int4 gG": (15 + 6 * SCALES, (BF16, "split8", "int8", "int4")),
    "native plain 8-bit AdamW, bf16 split8": (12 + 4 * SCALES, (BF16, "split8", "int8", "none")),
}
"""Bytes of the whole step: the sums' pass over gradients and global gradients, and the update."""


def native_step(shapes: Shapes, arguments: tuple[Any, ...]) -> Step:
    return NativeModel(shapes, *arguments).step


def native_sides(shapes: Shapes, only: Iterable[str] = ()) -> Iterator[Side]:
    """``only``: parts of names."""
    for name, (moved, arguments) in NATIVE.items():
        if not only or any(part in name for part in only):
            yield Side(name, moved, functools.partial(native_step, shapes, arguments))


def torch_sides(shapes: Shapes) -> Iterator[Side]:
    yield Side("triad, 28 B per parameter (the ceiling)", 28, lambda: triad(numel(shapes)))
    yield Side("the same four streams only read, 16 B", 16, lambda: triad(numel(shapes), writes=False))
    yield Side("torch foreach", 0, lambda: torch_adamw(shapes, foreach=True))
    yield Side("torch single tensor", 0, lambda: torch_adamw(shapes, foreach=False))
    yield Side("torch clip + similarity + boost + fused", 60, lambda: torch_dba(shapes))


def other_step(kind: type[torch.optim.Optimizer], shapes: Shapes) -> Step:
    return kind(torch_params(shapes), lr=1e-5).step


def other_sides(shapes: Shapes) -> Iterator[Side]:
    """Optimizers of other libraries that run on a CPU, where they are installed.

    ``pip install bitsandbytes torchao deepspeed``; the last compiles its kernel when first used, with ninja on PATH.
    """
    for name, module, attribute in (
        ("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("torchao AdamW8bit", "torchao.optim", "AdamW8bit"),
        ("DeepSpeed CPUAdam, fp32", "deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    ):
        try:
            kind = getattr(importlib.import_module(module), attribute)
            other_step(kind, [(64, 64)])()
        except Exception as error:  # whatever keeps it from running here is the row's content
            print(f"{name:50} not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        yield Side(name, 0, functools.partial(other_step, kind, shapes))


def compare_placed(shapes: Shapes, side: Side, rounds: int, placements: int, clock: Clock) -> Comparison:
    """``side`` against torch's fused AdamW, both made anew ``placements`` times.

    Where tensors come to lie in memory moves the ratio of two loops that are bound by it, the same way in every round:
    rounds alone would not show it.
    """
    parts = []
    for i in range(placements):
        shift = torch.empty(1_234_567 * i, dtype=torch.uint8)  # what comes after lies elsewhere
        parts.append(compare(torch_adamw(shapes, fused=True), side.make(), rounds, clock=clock))
        del shift
    return Comparison.pooled(parts)


def print_table(title: str, shapes: Shapes, sides: Iterable[Side], rounds: int, placements: int, clock: Clock) -> None:
    size = f"{numel(shapes) / 1e6:.1f} M parameters in {len(shapes)} tensors"
    print(f"\n{title}: {size}, {torch.get_num_threads()} threads")
    print(f"{'':50} {'median':>12}  {'ratio to torch fused fp32 (quartiles)':>30}")
    for side in sides:
        result = compare_placed(shapes, side, rounds, placements, clock)
        rate = f"{side.bytes * numel(shapes) / result.seconds / 1e9:6.1f} GB/s" if side.bytes else ""
        print(f"{side.name:50} {result} {rate}", flush=True)


@click.command()
@click.option("--only", multiple=True, help="Native rows whose name contains this; may be repeated.")
@click.option("--rounds", default=7, show_default=True, help="In each placement.")
@click.option("--placements", default=5, show_default=True, help="Times that both sides are made anew.")
@click.option("--model", "chosen", type=click.Choice([*MODELS, "all"]), default="all", show_default=True)
@click.option("--native-only", is_flag=True, help="Leave out torch's other rows and the other libraries.")
@click.option("--busy", is_flag=True, help="One thread and its CPU time: what can be measured on a busy machine.")
def main(only: tuple[str, ...], rounds: int, placements: int, chosen: str, native_only: bool, busy: bool) -> None:
    """Time of one optimizer step, every row interleaved with torch's fused AdamW in fp32."""
    clock = time.thread_time if busy else time.perf_counter
    if busy:
        torch.set_num_threads(1)
    print(machine_load() + ("; CPU time of one thread" if busy else ""))
    for title, shapes in MODELS.items():
        if chosen not in (title, "all"):
            continue
        print_table(title, shapes, native_sides(shapes, only), rounds, placements, clock)
        if not native_only:
            print_table(title, shapes, torch_sides(shapes), rounds, placements, clock)
        if not native_only and title == "50M":
            print_table(title, shapes, other_sides(shapes), 5, 2, clock)


@pytest.mark.parametrize("name", NATIVE)
def test_step(benchmark, name):
    moved, arguments = NATIVE[name]
    benchmark.extra_info["bytes_per_parameter"] = moved
    benchmark.pedantic(NativeModel([(1024, 1024)] * 8, *arguments).step, rounds=10, warmup_rounds=2)


def test_torch_fused(benchmark):
    benchmark.pedantic(torch_adamw([(1024, 1024)] * 8, fused=True), rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    main()

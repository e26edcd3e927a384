"""Time of a whole optimizer step on the CPU, as a user calls it: ``DBAAdamW.step()`` beside torch's fused AdamW.

``python -m bench.bench_step`` prints the table; ``pytest bench`` a short one. Every row is two optimizers that
alternate in a process of its own, so that no third one warms or fills a cache for them.
"""

from __future__ import annotations

import importlib
import itertools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import pytest
import torch

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.formats import GROUP
from dba_kernels.native import library

from .harness import Comparison, compare, in_fresh_process, machine_load, seconds_of
from .triad import BYTES_PER_ELEMENT, triad

Shapes = list[tuple[int, ...]]
Step = Callable[[], object]
BF16 = torch.bfloat16
LR, WEIGHT_DECAY = 1e-5, 1e-2


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
    "one tiny": [(128, 128)],
}


def numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --- the optimizers ---------------------------------------------------------------------------------------------------


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Random parameters with gradients of their own dtype."""
    params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def dba_adamw(
    shapes: Shapes, dtype: torch.dtype = torch.float32, global_format: str | None = None, **formats: Any
) -> Step:
    """``step`` of a ``DBAAdamW`` on parameters named by their number."""
    named = [(str(i), param) for i, param in enumerate(parameters(shapes, dtype))]
    if global_format is not None:
        means = ((name, torch.randn(param.shape) * 1e-3) for name, param in named)
        formats |= {"global_gradient": GlobalGradient.from_tensors(means, global_format), "total_steps": 1000}
    return DBAAdamW(named, lr=LR, weight_decay=WEIGHT_DECAY, backend="native", **formats).step


def torch_adamw(shapes: Shapes, **how: bool) -> Step:
    return torch.optim.AdamW(parameters(shapes), lr=LR, weight_decay=WEIGHT_DECAY, **how).step


def torch_dba(shapes: Shapes) -> Step:
    """What a user would write: clip_grad_norm_, similarity and boost in torch operations, then torch's fused AdamW."""
    params = parameters(shapes)
    global_grads = [torch.randn_like(param) * 1e-3 for param in params]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.no_grad()
    def step() -> None:
        grads = [param.grad for param in params if param.grad is not None]
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        for grad, global_grad in zip(grads, global_grads, strict=True):
            torch.dot(grad.flatten(), global_grad.flatten())
        torch._foreach_lerp_(grads, global_grads, 1e-6)
        optimizer.step()

    return step


def other_adamw(shapes: Shapes, module: str, attribute: str) -> Step:
    """An optimizer of another library, where it is installed: ``pip install bitsandbytes torchao deepspeed``."""
    kind = getattr(importlib.import_module(module), attribute)
    return kind(parameters(shapes), lr=LR).step


def triad_step(shapes: Shapes, writes: bool = True) -> Step:
    return triad(numel(shapes), writes)


# --- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table. ``bytes``: read and written per parameter and step, scales included; 0 where not stated."""

    name: str
    bytes: float
    make: Callable[..., Step]
    arguments: dict[str, Any] = field(default_factory=dict)

    def step(self, shapes: Shapes) -> Step:
        return self.make(shapes, **self.arguments)


SCALES = 4 / GROUP  # one fp32 scale per group
INT8_STATE = {"dtype": BF16, "state_format": "int8"}
OWN = [
    Row("plain AdamW, fp32", 28, dba_adamw),
    Row("DBA fp32, int8 gG", 34 + 2 * SCALES, dba_adamw, {"global_format": "int8"}),
    Row("DBA fp32, int8 gG, clip", 34 + 2 * SCALES, dba_adamw, {"global_format": "int8", "max_grad_norm": 1e9}),
    Row("DBA split16, int8 states, int8 gG", 18 + 6 * SCALES, dba_adamw, INT8_STATE | {"global_format": "int8"}),
    Row(
        *("DBA split8, int8 states, int8 gG", 16 + 6 * SCALES, dba_adamw),
        INT8_STATE | {"param_format": "split8", "global_format": "int8"},
    ),
    Row(
        *("DBA split8, int8 states, int4 gG", 15 + 6 * SCALES, dba_adamw),
        INT8_STATE | {"param_format": "split8", "global_format": "int4"},
    ),
    Row("plain 8-bit AdamW, split8", 12 + 4 * SCALES, dba_adamw, INT8_STATE | {"param_format": "split8"}),
]
"""Gradients have their parameter's dtype. Bytes of the whole step: the sums' pass over g and ĝ_G, and the update."""

TORCH = [
    Row("triad over the same four streams", BYTES_PER_ELEMENT, triad_step),
    Row("the four streams only read", 16, triad_step, {"writes": False}),
    Row("torch foreach", 0, torch_adamw, {"foreach": True}),
    Row("torch single tensor", 0, torch_adamw, {"foreach": False}),
    Row("torch clip + similarity + boost + fused", 60, torch_dba),
]
OTHERS = [
    Row("bitsandbytes AdamW8bit", 0, other_adamw, {"module": "bitsandbytes.optim", "attribute": "AdamW8bit"}),
    Row("torchao AdamW8bit", 0, other_adamw, {"module": "torchao.optim", "attribute": "AdamW8bit"}),
    Row("DeepSpeed CPUAdam, fp32", 0, other_adamw, {"module": "deepspeed.ops.adam", "attribute": "DeepSpeedCPUAdam"}),
]


def repeated(step: Step, seconds: float) -> Step:
    """``step`` as often as fills ``seconds``: a clock's tick and a cold cache weigh nothing then."""
    step()
    times = math.ceil(seconds / seconds_of(step))

    def run() -> None:
        for _ in range(times):
            step()

    run.times = times  # type: ignore[attr-defined]
    return run


def measure(row: Row, shapes: Shapes, threads: int, budget: float, busy: bool) -> Comparison:
    """``row`` and torch's fused AdamW in turns; runs in a process of its own. Times are those of one step."""
    torch.set_num_threads(threads)
    baseline = repeated(torch_adamw(shapes, fused=True), 2e-3)
    side = repeated(row.step(shapes), 2e-3)
    clock = time.thread_time if busy else time.perf_counter
    result = compare(baseline, side, rounds=1000, budget=budget, clock=clock)
    return Comparison(
        *([t / run.times for t in times] for run, times in ((baseline, result.baseline), (side, result.side)))
    )


def bandwidth(threads: int, elements: int = 50_000_000) -> float:
    """GB/s of the triad, the better half of its runs; runs in a process of its own."""
    torch.set_num_threads(threads)
    run = triad(elements)
    run()
    return BYTES_PER_ELEMENT * elements / sorted(seconds_of(run) for _ in range(15))[4] / 1e9


def print_row(row: Row, shapes: Shapes, threads: int, budget: float, processes: int, busy: bool) -> float | None:
    """The ratio's median; None where the row cannot run here."""
    try:
        parts = [in_fresh_process(measure, row, shapes, threads, budget / processes, busy) for _ in range(processes)]
    except Exception as error:  # whatever keeps another library from running here is the row's content
        if row in OWN:
            raise
        print(f"{row.name:42} not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
        return None
    result = Comparison.pooled(parts)
    own = f"{row.bytes * numel(shapes) / result.seconds / 1e9:6.1f}" if row.bytes else f"{'':6}"
    reached = BYTES_PER_ELEMENT * numel(shapes) / result.baseline_seconds / 1e9
    print(f"{row.name:42} {result} {own} {reached:7.1f}", flush=True)
    return result.ratio


def print_table(title: str, rows: list[Row], threads: int, budget: float, processes: int, busy: bool) -> None:
    shapes = MODELS[title]
    size = f"{numel(shapes) / 1e6:.3g} M parameters in {len(shapes)} tensors"
    print(f"\n{title}: {size}, {threads} thread{'s' * (threads > 1)}")
    print(f"{'':42} {'median':>12} {'ratio to torch fused fp32':>25} {'GB/s':>8} {'torch':>7}")
    ratios = [print_row(row, shapes, threads, budget, processes, busy) for row in rows]
    own = [f"{ratio:.2f}" for row, ratio in zip(rows, ratios, strict=True) if row in OWN and ratio is not None]
    if own:
        print(f"| {title}, {threads} | {' | '.join(own)} |")


@click.command()
@click.option("--only", multiple=True, help="Rows whose name contains this; may be repeated.")
@click.option("--model", "chosen", multiple=True, type=click.Choice(list(MODELS)), help="May be repeated.  [all]")
@click.option("--threads", multiple=True, type=int, help="May be repeated.  [1 and all]")
@click.option("--budget", default=8.0, show_default=True, help="Seconds of timed rounds per row.")
@click.option("--processes", default=2, show_default=True, help="Processes per row: tensors lie elsewhere in each.")
@click.option("--native-only", is_flag=True, help="Leave out torch's other rows and the other libraries.")
@click.option("--busy", is_flag=True, help="CPU time of one thread: what can be measured on a busy machine.")
def main(
    only: tuple[str, ...],
    chosen: tuple[str, ...],
    threads: tuple[int, ...],
    budget: float,
    processes: int,
    native_only: bool,
    busy: bool,
) -> None:
    """Time of one optimizer step, every row in turns with torch's fused AdamW in fp32.

    The last two columns are the bandwidths that the row and torch's optimizer reached in the same rounds.
    """
    counts = [1] if busy else list(threads) or sorted({1, torch.get_num_threads()})
    print(f"{machine_load()}; torch {torch.__version__}, {platform.machine()} {library.isa()}")
    rates = (f"{in_fresh_process(bandwidth, n):.1f} GB/s with {n}" for n in counts)
    print(f"triad, 28 B per element: {', '.join(rates)} thread{'s' * (counts[-1] > 1)}", flush=True)
    for title, n in itertools.product(chosen or MODELS, counts):
        rows = OWN if native_only else OWN + TORCH + (OTHERS if title == "50M" else [])
        rows = [row for row in rows if not only or any(part in row.name for part in only)]
        print_table(title, rows, n, budget, processes, busy)


@pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
def test_step(benchmark, row):
    benchmark.extra_info["bytes_per_parameter"] = row.bytes
    benchmark.pedantic(row.step([(1024, 1024)] * 8), rounds=10, warmup_rounds=2)


def test_torch_fused(benchmark):
    benchmark.pedantic(torch_adamw([(1024, 1024)] * 8, fused=True), rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    main()

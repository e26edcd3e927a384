"""All checks and benchmarks that need a GPU, in one command; writes one JSON file to send to whoever asks.

    python -m bench.gpu                      # on a GPU, a few minutes
    python -m bench.gpu --tiny               # the same path on a few elements; without a GPU, in the interpreter

Checks every kernel against the reference, replays a step in a CUDA graph, then times whole optimizer steps against
torch and the 8-bit optimizers that are installed, side by side in one run, and a fine-tuning step of a small language
model. Times taken in the interpreter say nothing about a GPU: they are not shown, and the file marks them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from rich.console import Console
from rich.table import Table

import dba_kernels
from dba_kernels import DBAAdamW, GlobalGradient

from .gpu_checks import checks
from .harness import compare
from .roofline import whole_step_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
Shapes = list[tuple[int, ...]]
MANY_SMALL: Shapes = [(256, 256)] * 300
FEW_LARGE: Shapes = [(8192, 4096)] * 8
TINY: dict[str, Shapes] = {"many small": [(64, 64)] * 3, "few large": [(64, 128)]}
LR = 1e-5


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """What a reader must know about the machine."""
    found = {
        "dba_kernels": dba_kernels.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "interpreted": INTERPRETED,
        "device": "CPU, Triton interpreter: times mean nothing" if INTERPRETED else torch.cuda.get_device_name(),
    }
    if not INTERPRETED:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


# --- optimizer steps --------------------------------------------------------------------------------------------------


class Model:
    """Named parameters with gradients; nothing else of a model."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype):
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.params = []
        for shape in shapes:
            param = torch.nn.Parameter((torch.randn(shape, device=DEVICE, generator=generator) * 0.02).to(dtype))
            param.grad = (torch.randn(shape, device=DEVICE, generator=generator) * 1e-3).to(dtype)
            self.params.append(param)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"layers.{i}.weight", param) for i, param in enumerate(self.params)]

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)


def ours(model: Model, state: str, param: str, stored: str | None) -> DBAAdamW:
    """DBAAdamW on the Triton backend; with a global gradient also the reduction, without one neither."""
    options: dict[str, Any] = {"state_format": state, "param_format": param, "backend": "triton", "lr": LR}
    if stored is not None:
        gradient = {name: p.detach().float() for name, p in model.named()}
        options |= {"global_gradient": GlobalGradient.from_tensors(gradient, format=stored), "total_steps": 10_000}
    return DBAAdamW(model.named(), **options)


def replayed(optimizer: DBAAdamW) -> Callable[[], Any]:
    """Its step as a CUDA graph, captured after three ordinary steps; in the interpreter the step itself."""
    for _ in range(3):
        optimizer.step()
    if INTERPRETED:
        return optimizer.step
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def graph_replay(tiny: bool) -> dict[str, Any]:
    """Steps captured in a CUDA graph and replayed give the bits of the same steps taken one by one."""
    models = [Model(TINY["many small"] if tiny else [(512, 512)] * 4, torch.bfloat16) for _ in range(2)]
    optimizers = [ours(model, "int8", "split16", "int8") for model in models]
    replay = replayed(optimizers[0])
    for _ in range(3):
        optimizers[1].step()
    before = [param.clone() for param in models[0].params]
    for _ in range(5):
        replay()
        optimizers[1].step()
    synchronize()
    same = all(torch.equal(x, y) for x, y in zip(models[0].params, models[1].params, strict=True))
    moved = any(not torch.equal(x, y) for x, y in zip(before, models[0].params, strict=True))
    return {"graph": not INTERPRETED, "replays": 5, "same_bits": same, "moved": moved}


@dataclass(frozen=True)
class Contender:
    """dtype of the parameters and gradients, a model's step, and bytes per parameter where they are known."""

    dtype: torch.dtype
    build: Callable[[Model], Callable[[], Any]]
    bytes_per_parameter: float | None = None


def our_contender(dtype: torch.dtype, state: str, kind: str, stored: str | None, graph: bool = False) -> Contender:
    def build(model: Model) -> Callable[[], Any]:
        optimizer = ours(model, state, kind, stored)
        return replayed(optimizer) if graph else optimizer.step

    return Contender(dtype, build, whole_step_bytes(dtype, dtype, kind, state, stored or "none"))


def contenders() -> dict[str, Contender]:
    """What is installed."""
    fp32, bf16 = torch.float32, torch.bfloat16
    found = {
        "torch AdamW foreach, fp32": Contender(fp32, lambda m: torch.optim.AdamW(m.params, lr=LR, foreach=True).step),
        "DBA fp32, int8 ĝ": our_contender(fp32, "fp32", "native", "int8"),
        "AdamW fp32 (dba_kernels)": our_contender(fp32, "fp32", "native", None),
        "DBA split16, int8 state, int8 ĝ": our_contender(bf16, "int8", "split16", "int8"),
        "DBA split16, int8 state, int8 ĝ, CUDA graph": our_contender(bf16, "int8", "split16", "int8", graph=True),
        "DBA split8, int8 state, int4 ĝ": our_contender(bf16, "int8", "split8", "int4"),
        "8-bit AdamW split8 (dba_kernels)": our_contender(bf16, "int8", "split8", None),
    }
    peers = {
        "FlashOptim AdamW, 8-bit": ("flashoptim", "FlashAdamW"),
        "torchao AdamW, 8-bit": ("torchao.optim", "AdamW8bit"),
        "bitsandbytes AdamW, 8-bit": ("bitsandbytes.optim", "AdamW8bit"),
    }
    for name, (module, attribute) in peers.items():
        if not INTERPRETED and importlib.util.find_spec(module.split(".")[0]) is not None:
            found[name] = Contender(bf16, lambda m, path=(module, attribute): _peer(*path)(m.params, lr=LR).step)
    return found


def _peer(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def copy_bandwidth(tiny: bool) -> float:
    """Bytes per second, read plus written, of a device-to-device copy."""
    source = torch.empty(2**12 if tiny else 2**28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def finished(step: Callable[[], Any]) -> Callable[[], None]:
    """The step, and the wait for it."""

    def run() -> None:
        step()
        synchronize()

    return run


def step_times(shapes: Shapes, bandwidth: float, tiny: bool) -> dict[str, Any]:
    """Every contender against torch's fused AdamW in fp32, alternating in one run."""
    baseline_model = Model(shapes, torch.float32)
    baseline = finished(torch.optim.AdamW(baseline_model.params, lr=LR, fused=True).step)
    rows: dict[str, Any] = {}
    for name, contender in contenders().items():
        try:
            side = finished(contender.build(Model(shapes, contender.dtype)))
            times = compare(baseline, side, rounds=2 if tiny else 50, warmup=1 if tiny else 10)
        except Exception as error:  # a peer that fails on this machine must not cost the rest of the report
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        rows[name] = {"ms": times.seconds * 1e3, "ratio": times.ratio, "spread": times.spread}
        if contender.bytes_per_parameter:
            moved = contender.bytes_per_parameter * baseline_model.numel
            rows[name]["share_of_copy_bandwidth"] = moved / times.seconds / bandwidth
    return {"parameters": baseline_model.numel, "tensors": len(shapes), "against_torch_fused_fp32": rows}


# --- a fine-tuning step -----------------------------------------------------------------------------------------------


def language_model(tiny: bool) -> torch.nn.Module:
    """A Llama of SmolLM2-135M's shape with random bf16 weights; no download."""
    from .models import SMOLLM2_135M, llama

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": True} if tiny else SMOLLM2_135M
    return llama(**sizes).to(DEVICE, torch.bfloat16)


def fine_tuning(tiny: bool) -> dict[str, Any]:
    """Tokens per second and peak memory of whole training steps, forward and backward included."""
    batch, length, steps = (1, 8, 2) if tiny else (8, 512, 10)
    makers: dict[str, Callable[[torch.nn.Module], Any]] = {
        "torch AdamW fused, bf16": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, fused=True),
        "DBA split16, int8 state, int8 ĝ": lambda m: DBAAdamW(
            m.named_parameters(),
            lr=LR,
            global_gradient=GlobalGradient.from_tensors({n: p.detach().float() for n, p in m.named_parameters()}),
            total_steps=10_000,
            state_format="int8",
            backend="triton",
        ),
    }
    rows = {}
    for name, make in makers.items():
        if not INTERPRETED:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = language_model(tiny)
        optimizer = make(model)
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=DEVICE)
        for i in range(steps + 1):
            if i == 1:  # the first step compiles and allocates
                synchronize()
                start = time.perf_counter()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize()
        seconds = time.perf_counter() - start
        peak = None if INTERPRETED else torch.cuda.max_memory_allocated() / 2**30
        rows[name] = {"tokens_per_second": batch * length * steps / seconds, "peak_memory_gb": peak}
        del model, optimizer
    return {"tokens_per_step": batch * length, "steps": steps, **rows}


# --- report -----------------------------------------------------------------------------------------------------------


def report(tiny: bool) -> dict[str, Any]:
    """The whole file. A part that fails is replaced by its traceback."""
    shapes = TINY if tiny else {"many small": MANY_SMALL, "few large": FEW_LARGE}
    bandwidth = copy_bandwidth(tiny)
    parts: dict[str, Callable[[], Any]] = {
        "environment": environment,
        "checks": lambda: checks(tiny),
        "graph_replay": lambda: graph_replay(tiny),
        **{name: (lambda chosen=chosen: step_times(chosen, bandwidth, tiny)) for name, chosen in shapes.items()},
        "fine_tuning": lambda: fine_tuning(tiny),
    }
    found: dict[str, Any] = {"copy_bandwidth_gb_per_second": bandwidth / 1e9}
    for name, part in parts.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            found[name] = part()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """Parts that raised, and checks that failed."""
    broken = [f"{name}: {part['error']}" for name, part in found.items() if isinstance(part, dict) and "error" in part]
    broken += [f"{name}: {why}" for name, why in found["checks"].get("failures", {}).items()]
    replay = found["graph_replay"]
    return broken + [f"graph_replay: {key}" for key in ("same_bits", "moved") if not replay.get(key, True)]


def print_times(console: Console, name: str, part: dict[str, Any]) -> None:
    title = f"{name}: {part['parameters']:,} parameters in {part['tensors']} tensors"
    table = Table("optimizer step", "ms", "÷ torch fused fp32 (quartiles)", "% of copy bandwidth", title=title)
    for side, row in part["against_torch_fused_fp32"].items():
        if "error" in row:
            table.add_row(side, row["error"])
            continue
        share = row.get("share_of_copy_bandwidth")
        low, high = row["spread"]
        ratio = f"{row['ratio']:.3f} ({low:.3f} - {high:.3f})"
        table.add_row(side, f"{row['ms']:.3f}", ratio, "" if share is None else f"{100 * share:.0f}")
    console.print(table)


def print_report(console: Console, found: dict[str, Any]) -> None:
    console.print(found["environment"], {"checks": found["checks"], "graph_replay": found["graph_replay"]})
    if INTERPRETED:
        console.print("no GPU: every part ran, its times are not shown")
        return
    console.print({"copy bandwidth, GB/s": round(found["copy_bandwidth_gb_per_second"])})
    for name in ("many small", "few large"):
        if "error" not in found[name]:
            print_times(console, name, found[name])
    console.print({"fine_tuning": found["fine_tuning"]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few elements; in the interpreter if there is no GPU")
    parser.add_argument("--output", type=Path, default=Path("dba_kernels_gpu.json"), help="where the report goes")
    arguments = parser.parse_args()
    if INTERPRETED and not arguments.tiny:
        parser.error("no GPU: torch.cuda.is_available() is False; --tiny runs the same path in the interpreter")
    if not arguments.output.parent.exists():
        parser.error(f"--output: the folder {arguments.output.parent} does not exist")
    found = report(arguments.tiny)
    arguments.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print_report(Console(), found)
    broken = problems(found)
    for problem in broken:
        print(f"FAILED {problem}")
    print(f"written to {arguments.output}; " + (f"{len(broken)} problems" if broken else "all checks passed"))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""The device that a section runs on, its clock, and what a reader must know of the machine."""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .report import Report

SIMULATED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if SIMULATED else "cuda:0")


def synchronize() -> None:
    if not SIMULATED:
        torch.cuda.synchronize()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def host_seconds(run: Callable[[], Any], times: int) -> float:
    """Host time of one call where the device has long been given more to do than it has done."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds / times


def device_seconds(run: Callable[[], Any], times: int = 10, rounds: int = 7) -> float:
    """Median over ``rounds`` of the time between two events around ``times`` queued calls, per call."""
    if SIMULATED:
        return host_seconds(run, 1)
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e-3 / times)
    return statistics.median(found)


def free_memory() -> None:
    """Give cached memory back, so that one contender does not run in another's fragments."""
    if not SIMULATED:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- section: environment ---------------------------------------------------------------------------------------------


def environment(report: Report) -> None:
    """Versions, the device, what is installed beside it."""
    report.attempt("versions", _versions)
    report.attempt("device", _device)
    report.attempt("nvidia-smi", _smi)


def _versions() -> dict[str, Any]:
    import numpy
    import triton

    import dba_kernels

    found = {"dba_kernels": dba_kernels.__version__, "torch": torch.__version__, "triton": triton.__version__}
    found |= {"numpy": numpy.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("bitsandbytes", "torchao", "flashoptim", "transformers"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "no version")
        except Exception as error:
            found[name] = f"cannot be imported: {type(error).__name__}"
    return found


def _device() -> dict[str, Any]:
    if SIMULATED:
        return {"name": "CPU, Triton's interpreter: times mean nothing"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _smi() -> dict[str, Any]:
    if SIMULATED:
        return {"clocks": "none"}
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    return (
        dict(zip(fields.split(","), result.stdout.strip().splitlines()[0].split(", "), strict=False))
        if result.stdout
        else {}
    )

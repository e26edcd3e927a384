"""``dba-kernels env``: what is installed, what can run here and why not, and a sanity step on each backend that can."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

import dba_kernels
from dba_kernels import DBAAdamW, GlobalGradient, backends

PACKAGES = ("triton", "numpy", "safetensors", "transformers", "accelerate", "gguf", "matplotlib")
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
AGREEMENT = 1e-2
"""Largest distance from the reference, relative to the way gone, that passes. An int8 moment on a rounding boundary may
take either code, which moves one of the 4,800 elements; a wrong kernel moves all of them."""


@click.command("env")
def command() -> None:
    """Print versions, devices, CPU features and backends, and run a sanity step on each usable backend.

    Exit status 1 if a backend that should work does not.
    """
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts():
        facts.add_row(name, value)
    console.print(facts)
    table = Table("device", "backend", "state", title="backends", title_justify="left")
    healthy = True
    for device in _devices():
        for backend in backends.BACKENDS:
            healthy &= _add_backend(table, device, backend)
    console.print(table)
    raise SystemExit(0 if healthy else 1)


def _facts() -> list[tuple[str, str]]:
    facts = [("dba-kernels", dba_kernels.__version__), ("from", str(Path(dba_kernels.__file__).parent))]
    facts += [("python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    facts += [("torch", torch.__version__)]  # which says for what it was built, as its package's metadata may not
    facts += [(name, _version(name)) for name in PACKAGES]
    facts += [
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        ("CPU", f"{torch.backends.cpu.get_cpu_capability()} ({' '.join(_cpu_flags()) or 'flags unknown'})"),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        facts.append((f"GPU {index}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"))
    facts += [("GPU", "none")] * (torch.cuda.device_count() == 0)
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> list[str]:
    """Those of ``CPU_FLAGS`` that Linux reports; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return [flag for flag in CPU_FLAGS if flag in flags]


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _add_backend(table: Table, device: str, backend: str) -> bool:
    """A row of the table; False if the backend says that it works and does not."""
    reason = backends.why_not(backend, device)
    if reason is not None:
        table.add_row(device, backend, f"[yellow]no[/]: {reason}")
        return True
    try:
        error = sanity_error(backend, device)
    except Exception as failure:  # whatever a broken installation throws is what is to be shown
        table.add_row(device, backend, f"[red]broken[/]: {type(failure).__name__}: {failure}")
        return False
    verdict = "[green]works[/]" if error <= AGREEMENT else "[red]wrong[/]"
    table.add_row(device, backend, f"{verdict}: three steps differ from the reference by {error:.1e}")
    return error <= AGREEMENT


def sanity_error(backend: str, device: str) -> float:
    """Three steps of DBA in the smallest formats; distance from the reference over the way gone."""
    start, reached = _sanity_steps(backend, device)
    _, expected = _sanity_steps("reference", device)
    return float((reached - expected).norm() / (expected - start).norm())


def _sanity_steps(backend: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start, global_grad, *grads = (torch.randn(48, 100, generator=generator) for _ in range(5))
    weight = torch.nn.Parameter(start.to(device, copy=True))
    optimizer = DBAAdamW(
        [("weight", weight)],
        lr=3e-5,
        global_gradient=GlobalGradient.from_tensors({"weight": global_grad}, format="int8"),
        total_steps=1000,
        state_format="int8",
        backend=backend,
    )
    for grad in grads:
        weight.grad = grad.to(device)
        optimizer.step()
    return start, weight.detach().cpu()

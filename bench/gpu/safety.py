"""Small cases of every kernel under ``compute-sanitizer``, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.support import cases

from . import kernels, scalars
from .device import SIMULATED
from .driver import read_lines

if TYPE_CHECKING:
    from .report import Report


def small(report: Report) -> None:
    """What runs under the sanitizer: a few formats, ragged and misaligned."""
    for case in cases.size_cases()[:4]:
        for elements in (0, 1):
            report.attempt(f"step {case}, {elements} off", kernels.check_step, case, elements)
            report.attempt(f"sums {case}, {elements} off", kernels.check_sums, case, elements)
    report.attempt("accumulate", scalars.check_accumulate, torch.bfloat16, 1)
    report.attempt("encode int4", scalars.check_encode, "int4", torch.bfloat16)


def check(tool: str) -> dict[str, int]:
    """No access out of bounds, no race, no memory that nobody wrote, seen by the sanitizer's own instruments."""
    from .report import Absent

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if SIMULATED or sanitizer is None:
        raise Absent("compute-sanitizer is not installed")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        run = [sys.executable, "-m", "bench.gpu.section", "safety", "small", str(lines)]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only", *run]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=55, env=environment, check=False)
        except subprocess.TimeoutExpired as error:
            raise Absent(f"{tool} did not end in 55 s: {len(read_lines(lines)) // 2} cases, no error") from error
        ended = [line for line in read_lines(lines) if "end" in line]
    failed = [line["end"] for line in ended if "failed" in line]
    assert result.returncode == 0 and not failed, f"{tool}: {failed} {(result.stdout + result.stderr)[-1200:]}"
    return {"cases": len(ended)}


def run(report: Report) -> None:
    for tool in ("memcheck",):
        report.attempt(tool, check, tool)

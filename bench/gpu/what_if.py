"""Other choices than the library's, timed: what to change next. Each in a process of its own, for it is compiled anew.

The constants are overridden before any kernel is compiled; a name that a module no longer has is reported as absent.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from .device import SIMULATED, device_seconds

if TYPE_CHECKING:
    from .report import Report

KERNELS = "dba_kernels.kernels"
TIMED = ("step bf16 split8, bf16 grad, int8 state, int4", "step bf16 split16, bf16 grad, int8 state, int8")
TIMED = (*TIMED, "similarity bf16 grad, int4", "similarity bf16 grad, int8")
CHOICES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "4 tiles per chunk": {"MOST_TILES": 4},
    "16 tiles per chunk": {"MOST_TILES": 16},
    "8 warps, tiles of 2048": {"num_warps": 8, "TILE": 2048},
    "2 warps, tiles of 512": {"num_warps": 2, "TILE": 512},
    "8 warps, tiles of 1024": {"num_warps": 8},
    "masked tiles of 512": {"MASKED_TILE": 512},
}
MODULES = ("common", "tables", "step", "similarity", "accumulate", "quantize", "codecs", "remainder", "coefficients")


def override(constants: dict[str, int]) -> list[str]:
    """Set the constants in every module that has them; returns where."""
    import triton.language as tl

    places = []
    for module in MODULES:
        try:
            loaded = importlib.import_module(f"{KERNELS}.{module}")
        except ImportError:
            continue
        for name, value in constants.items():
            if name == "num_warps" and hasattr(loaded, "LAUNCH"):
                loaded.LAUNCH["num_warps"] = value
                places.append(f"{module}.LAUNCH")
            elif hasattr(loaded, name):
                constant = isinstance(getattr(loaded, name), tl.constexpr)
                setattr(loaded, name, tl.constexpr(value) if constant else value)
                places.append(f"{module}.{name}")
    return places


def child(constants: dict[str, int]) -> dict[str, float | str]:
    """µs per million parameters of the timed variants under these constants."""
    if constants and not override(constants):
        return {"absent": f"nothing has {', '.join(constants)}"}
    from . import speed

    found: dict[str, float | str] = {}
    for variant in speed.VARIANTS:
        if not variant.name.startswith(TIMED):
            continue
        try:
            run = speed.launch_of(variant)
            run()
            found[variant.name] = device_seconds(run) / (speed.SHAPE[0] * speed.SHAPE[1]) * 1e12
        except Exception as error:
            found[variant.name] = f"{type(error).__name__}: {error}"[:200]
    return found


def check(constants: dict[str, int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu.what_if", json.dumps(constants)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ, check=False)
    assert result.returncode == 0, f"status {result.returncode}: {result.stderr[-500:]}"
    return json.loads(result.stdout.splitlines()[-1])


def run(report: Report) -> None:
    for name, constants in list(CHOICES.items())[:2] if SIMULATED else CHOICES.items():
        report.attempt(name, check, constants)


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))

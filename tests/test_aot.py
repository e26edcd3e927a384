"""The Triton kernels compile ahead of time, without a GPU, to code that keeps its promises.

Compiling fails in a process that runs the interpreter, so it happens in one of its own. Here a part of the list; all of
it, for every target: ``python -m bench.roofline --targets all``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="the wheel carries no NVIDIA backend")

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (
    "step fp32 native, fp32 grad, fp32 state, none",
    "step fp32 native, bf16 grad, fp32 state, int8",
    "step bf16 split16, bf16 grad, int8 state, int8",
    "step bf16 split8, bf16 grad, int8 state, int4",
    "step fp16 split8, fp16 grad, int8 state, fp8",
    "similarity bf16 grad, int8",
    "coefficients",
)
MODELLED = {"fma.rn.f32", "fma.rn.f64", "div.full.f32", "div.rn.f64", "sqrt.rn.f64"} | {
    f"{root}.approx.ftz.f32" for root in ("sqrt", "rsqrt")
}
"""Inexact operations whose error bench/roofline.py bounds; float64 ones are correctly rounded."""


def roofline(*arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.roofline", "--json", *arguments]
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def hopper() -> dict[str, dict]:
    rows = {row["name"]: row for row in roofline("--targets", "sm_90", "--match", "|".join(CHECKED))}
    assert len(rows) == len(CHECKED)
    return rows


def steps(rows: dict[str, dict]) -> list[dict]:
    return [row for name, row in rows.items() if name.startswith("step")]


def test_nothing_spills(hopper):
    """Protects the kernels' speed: no production variant spills registers."""
    assert {row["spill_bytes"] for row in hopper.values()} == {0}


def test_full_tiles_access_sixteen_bytes(hopper):
    """Protects the bandwidth: the full-tile path loads, and in plain fp32 also stores, 16 bytes at once."""
    for row in hopper.values():
        if row["bytes_per_parameter"]:
            widest = max(row["widths"]["LDG"])
            assert widest == 16, f"{row['name']}: widest load {widest} bytes"
    plain = hopper["step fp32 native, fp32 grad, fp32 state, none ĝ"]
    assert set(plain["widths"]["LDG"] + plain["widths"]["STG"]) == {16}


def test_instructions_per_parameter(hopper):
    """Protects the claim that bandwidth binds: instructions per parameter stay below what hides behind the memory."""
    for row in steps(hopper):
        assert row["sass_per_parameter"] <= 100, f"{row['name']}: {row['sass_per_parameter']:.1f}"
        assert row["mufu_per_parameter"] <= 8, f"{row['name']}: {row['mufu_per_parameter']:.2f}"
    headline = hopper["step bf16 split16, bf16 grad, int8 state, int8 ĝ"]
    assert headline["sass_per_parameter"] <= 70  # 62, and 5 that keep NaN out of weights written outside a step


def test_bytes_in_flight(hopper):
    """Protects the bandwidth: every step keeps enough bytes in flight per SM to cover the memory's latency."""
    for row in steps(hopper):
        assert row["bytes_in_flight"] >= 24 * 1024, f"{row['name']}: {row['bytes_in_flight']} bytes per SM"


def test_inexact_operations_are_the_known_ones(hopper):
    """Protects the error bounds: each approximate instruction that the compiler chose has a derived bound."""
    found = {operation for row in hopper.values() for operation in row["inexact"]}
    assert found <= MODELLED, f"not bounded: {found - MODELLED}"
    assert "sqrt.approx.ftz.f32" in found  # the search finds what is there


def test_every_target_compiles():
    """Protects the list of supported GPUs: each target compiles without spills, AMD's included."""
    rows = roofline("--targets", "all", "--match", CHECKED[2])
    assert {row["target"] for row in rows} == {
        *("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        "gfx942",
    }
    assert {row["spill_bytes"] for row in rows} == {0}
    assert next(row for row in rows if row["target"] == "gfx942")["wide_accesses"] > 0

"""The Triton kernels compile ahead of time, without a GPU, to code that keeps its promises.

Compiling fails in a process that runs the interpreter, so it happens in one of its own. Here a part of the list; all of
it, for every target: ``python -m bench.roofline --targets all``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="the wheel carries no NVIDIA backend")

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (
    "step fp32 native, fp32 grad, fp32 state, none",
    "step fp32 native, bf16 grad, fp32 state, int8 ĝ$",
    "step bf16 native, bf16 grad, int8 state, none",
    "step bf16 split16, bf16 grad, int8 state, int8 ĝ$",
    "step bf16 split8, bf16 grad, int8 state, int4 ĝ$",
    "step fp16 split8, fp16 grad, int8 state, fp8",
    "similarity bf16 grad, int8 ĝ$",
    "similarity bf16 grad, int4 ĝ$",
    "coefficients",
)
HEADLINE = "step bf16 split8, bf16 grad, int8 state, int4"
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


@pytest.fixture(scope="module")
def everywhere() -> list[dict]:
    """One variant, each of its paths, for all targets."""
    return roofline("--targets", "all", "--match", HEADLINE)


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
    """Protects the bandwidth: at 1 µs of latency 36 KB per SM allow more than the memory of an H200 can give."""
    for row in hopper.values():
        if row["bytes_per_parameter"]:
            assert row["bytes_in_flight"] >= 36 * 1024, f"{row['name']}: {row['bytes_in_flight']} bytes per SM"


def test_scales_are_stored_without_going_through_shared_memory(hopper):
    """Protects the tile's length: one barrier, where int8 states order their loads, and nothing is exchanged."""
    for row in steps(hopper):
        barriers = 1 if "int8 state" in row["name"] else 0
        assert (row["tile_barriers"], row["shared_bytes"]) == (barriers, 0), row["name"]


def test_inexact_operations_are_the_known_ones(hopper):
    """Protects the error bounds: each approximate instruction that the compiler chose has a derived bound."""
    found = {operation for row in hopper.values() for operation in row["inexact"]}
    assert found <= MODELLED, f"not bounded: {found - MODELLED}"
    assert "sqrt.approx.ftz.f32" in found  # the search finds what is there


def test_every_target_compiles(everywhere):
    """Protects the list of GPUs in the README: full tiles, narrow and masked ones, without spills."""
    targets = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
    paths = ("int4 ĝ", "int4 ĝ, narrow", "int4 ĝ, masked")
    assert {(row["target"], row["name"].partition("state, ")[2]) for row in everywhere} == set(product(targets, paths))
    assert {row["spill_bytes"] for row in everywhere} == {0}
    amd = next(row for row in everywhere if row["target"] == "gfx942")
    assert amd["wide_accesses"] > 0


def test_misaligned_gradients_slow_nothing_else(everywhere):
    """Protects models with flat gradient buffers: all tensors but the gradient keep their vectors."""
    loads = {row["name"].rpartition(" ")[2]: row["widths"]["LDG"] for row in everywhere if row["target"] == "sm_90"}
    assert loads["ĝ"].count(16) == 2
    assert (loads["narrow"].count(16), loads["narrow"].count(2)) == (1, 8)

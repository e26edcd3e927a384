"""What every kernel variant asks of a GPU, without one: registers, spills, access widths, instructions, bytes.

    python -m bench.roofline                      # every variant, sm_90, and the whole-step table
    python -m bench.roofline --targets all        # compile for every target, spills and registers
    python -m bench.roofline --json --match int4  # machine-readable, some variants

Times are *predicted*: bytes over measured copy bandwidth, instructions over the full issue rate, whichever is longer.

Arithmetic that the interpreter does not model, with the relative errors that NVIDIA's PTX manual states: fma.rn (rounds
once instead of twice), sqrt.approx.ftz 2⁻²³, rsqrt.approx.ftz 2⁻²²·⁹, div.full 2 ulp. Their effect in eq. 8, to first
order: d = √v·c + ε is off by 1.5·2⁻²³ (root, one rounding), 1/√d by 0.75 + 1.07 = 1.82, its square by 3.64 + 0.5, times
m and the step size 5.2·2⁻²³ of the *update*; of θ, as a rule the largest term, far below half an ulp. Group scales'
inverses (div.full) are off by at most 2⁻²², codes only where a value sits on a rounding boundary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dba_kernels.kernels.common import CHUNK, THREADS, TILE

from .sass import Profile, profile
from .variants import BF16, FP32, TARGETS, VARIANTS, Variant, compile_variant, similarity_variant, step_variant

BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
"""Bytes per second, read plus written, of a device-to-device copy, as measured on rented machines."""
ISSUE_RATE = 132 * 4 * 32 * 1.755e9
"""Thread instructions per second of an H100 or H200 SXM: 132 SMs, 4 warp schedulers each, 1.755 GHz boost clock."""
MUFU_RATE = 132 * 16 * 1.755e9
"""Special-function results per second: 16 per SM and clock."""
TILES_PER_CHUNK = CHUNK.value // TILE.value
ELEMENTS = TILE.value // THREADS
INEXACT = re.compile(r"\b(?:fma|sqrt|rsqrt|rcp|div|sin|cos|ex2|lg2|tanh)\.[a-z.]*f(?:16|32|64)\b")
"""PTX operations on floats other than the correctly rounded single ones."""


def analyse(variant: Variant, target: str = "sm_90") -> dict[str, Any]:
    """Figures of one variant on one NVIDIA target."""
    compiled = compile_variant(variant, target)
    read = profile(compiled.asm["cubin"], target, THREADS)
    sass, mufu = per_parameter(variant, read)
    return {
        "name": variant.name,
        "target": target,
        "bytes_per_parameter": variant.bytes_per_parameter,
        "sass_per_parameter": sass,
        "mufu_per_parameter": mufu,
        "inexact": sorted(set(INEXACT.findall(compiled.asm["ptx"]))),
        **dataclasses.asdict(read),
    }


def per_parameter(variant: Variant, read: Profile) -> tuple[float, float]:
    """(instructions, MUFU) per parameter. A loop that the compiler unrolled handles several tiles in one turn."""
    unrolled = max(1, int(sum(read.widths["LDG"]) // (ELEMENTS * variant.bytes_read))) if variant.bytes_read else 1
    turns = max(1, TILES_PER_CHUNK // unrolled)
    total = read.once_instructions + turns * read.tile_instructions
    return total / (TILES_PER_CHUNK * ELEMENTS), read.tile_mufu / (unrolled * ELEMENTS)


def amd_figures(variant: Variant) -> dict[str, Any]:
    """Registers and spills that the assembler text for gfx942 declares."""
    text = compile_variant(variant, "gfx942").asm["amdgcn"]

    def declared(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    return {
        "name": variant.name,
        "target": "gfx942",
        "registers": declared("vgpr_count"),
        "spill_bytes": 4 * (declared("vgpr_spill_count") + declared("sgpr_spill_count")),
        "wide_accesses": len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text)),
    }


# --- whole steps ------------------------------------------------------------------------------------------------------

OURS = {
    "fp32 θ, m, v; int8 ĝ_G": (FP32, BF16, "native", "fp32", "int8"),
    "bf16 split16, int8 m, v; int8 ĝ_G": (BF16, BF16, "split16", "int8", "int8"),
    "bf16 split8, int8 m, v; int8 ĝ_G": (BF16, BF16, "split8", "int8", "int8"),
    "bf16 split8, int8 m, v; int4 ĝ_G": (BF16, BF16, "split8", "int8", "int4"),
    "bf16 split8, int8 m, v; no ĝ_G, no clip": (BF16, BF16, "split8", "int8", "none"),
}
OTHERS = {
    "torch, fp32 gradients: fused AdamW 28 + clip_grad_norm_ 12 + boost by lerp 12 + dot 8": 60.0,
    "torch, fp32 gradients: fused AdamW alone": 28.0,
    "FlashOptim as published: bf16 + 8-bit correction, int8 m, v in groups of 32 with fp16 scales (no ĝ_G)": (
        2 + 2 * (2 + 1) + 2 * (2 + 4 / 32)
    ),
}


def whole_step_bytes(param: torch.dtype, grad: torch.dtype, kind: str, state: str, stored: str) -> float:
    """Bytes per parameter of similarity and step together, scales included; of the step alone without ĝ_G."""
    update = step_variant(param, grad, kind, state, stored).bytes_per_parameter
    return update + (similarity_variant(grad, stored).bytes_per_parameter if stored != "none" else 0.0)


def predicted(bytes_per_parameter: float, sass: float, mufu: float, gpu: str) -> tuple[float, str]:
    """(µs per million parameters, the resource that binds)."""
    times = {
        "bandwidth": bytes_per_parameter / BANDWIDTH[gpu],
        "issue": sass / ISSUE_RATE,
        "MUFU": mufu / MUFU_RATE,
    }
    binding = max(times, key=times.__getitem__)
    return times[binding] * 1e12, binding


def print_variants(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("variant", title=f"Compiled for {rows[0]['target']}; widths in bytes per thread and access")
    for heading in ("B/param", "regs", "spill", "KB in flight/SM", "SASS/param", "MUFU/param", "widest", "narrowest"):
        table.add_column(heading, justify="right")
    for heading in ("H100 µs/M, predicted", "H200 µs/M, predicted"):
        table.add_column(heading)
    for r in rows:
        widths = r["widths"]["LDG"] + r["widths"]["STG"]
        cost = (r["bytes_per_parameter"], r["sass_per_parameter"], r["mufu_per_parameter"])
        times = [f"{time:.1f} ({why})" for time, why in (predicted(*cost, gpu) for gpu in BANDWIDTH)]
        figures = [f"{r['bytes_per_parameter']:.2f}", str(r["registers"]), str(r["spill_bytes"])]
        figures += [f"{r['bytes_in_flight'] / 1024:.0f}", f"{r['sass_per_parameter']:.1f}"]
        figures += [f"{r['mufu_per_parameter']:.2f}", str(max(widths)), str(min(widths))]
        if not r["bytes_per_parameter"]:  # scalars of a step: nothing here is per parameter
            figures, times = ["", figures[1], figures[2], "", "", "", "", ""], ["", ""]
        table.add_row(r["name"], *figures, *times)
    console.print(table)


def print_whole_steps(console: Console) -> None:
    table = Table("whole step, bf16 gradients unless said", title="Bytes per parameter, scales included")
    for heading in ("B/param", "H100 µs/M, predicted", "H200 µs/M, predicted"):
        table.add_column(heading, justify="right")
    rows = {name: whole_step_bytes(*formats) for name, formats in OURS.items()} | OTHERS
    for name, count in rows.items():
        table.add_row(name, f"{count:.2f}", *(f"{count / rate * 1e12:.1f}" for rate in BANDWIDTH.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="regular expression: only variants whose name it finds")
    parser.add_argument("--targets", default="sm_90", help=f"comma-separated, or all: {', '.join(TARGETS)}")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of tables")
    arguments = parser.parse_args()
    targets = list(TARGETS) if arguments.targets == "all" else arguments.targets.split(",")
    chosen = [variant for variant in VARIANTS if re.search(arguments.match, variant.name)]
    console = Console(width=200)
    everything = []
    for target in targets:
        print(f"{target}: {len(chosen)} kernels …", file=sys.stderr, flush=True)
        rows = [amd_figures(v) if target == "gfx942" else analyse(v, target) for v in chosen]
        everything += rows
        if arguments.json:
            continue
        if target == "gfx942":
            for row in rows:
                console.print(row)
        else:
            print_variants(console, rows)
    if arguments.json:
        print(json.dumps(everything, indent=1))
    else:
        print_whole_steps(console)


if __name__ == "__main__":
    main()

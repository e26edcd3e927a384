"""What every kernel variant asks of a GPU, without one: registers, spills, access widths, instructions, bytes.

    python -m bench.roofline                      # every variant, sm_90, and the whole-step table
    python -m bench.roofline --targets all        # compile for every target, spills and registers
    python -m bench.roofline --json --match int4  # machine-readable, some variants
    pip install --target older --no-deps triton==3.6.0 && PYTHONPATH=older python -m bench.roofline  # another Triton

Times are *predicted*: bytes over measured copy bandwidth, instructions over the rates of their units, bytes read over
what the bytes in flight allow at the memory's latency (Little's law), whichever takes longest; the last table says
where each rate comes from. Masked tiles are those of ragged ends, padded rows and misaligned storage; narrow ones read
a misaligned gradient element by element.

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
import triton
from rich.console import Console
from rich.table import Table

from dba_kernels.formats import PARAM_FORMATS
from dba_kernels.kernels.common import THREADS, tile_of
from dba_kernels.kernels.tables import MOST_TILES

from .sass import Profile, profile
from .variants import (
    BF16,
    FP32,
    OTHER_PATHS,
    TARGETS,
    VARIANTS,
    Variant,
    compile_variant,
    similarity_variant,
    step_variant,
)

FLOPS = 66.9e12
SMS, CLOCK = 132, FLOPS / (132 * 128 * 2)
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
LATENCY = 1.0e-6
PER_CLOCK = {"issue": 128, "integer": 64, "special": 16}
"""Results per SM and clock of what an instruction may wait for."""
SOURCES = {
    f"{SMS} SMs at {CLOCK / 1e9:.2f} GHz": "white paper NVIDIA H100 Tensor Core GPU Architecture, table of the SXM5 "
    "part: 132 SMs, 66.9 TFLOPS of fp32 = SMs × 128 lanes × 2 × clock; the H200 datasheet states the same compute",
    "issue 128 thread instructions per SM and clock": "the same paper: four warp schedulers, 32 lanes each",
    "integer 64 results per SM and clock": "CUDA C++ Programming Guide, throughput of arithmetic instructions, compute "
    "capability 9.0: integer add, compare, minimum, maximum, shift, logic",
    "special 16 results per SM and clock": "the same table: reciprocal, square root; integer-to-float conversions are "
    "counted here too, which is pessimistic",
    "copy 3.0 TB/s (H100), 4.3 TB/s (H200)": "device-to-device copies on rented machines, read plus written; the "
    "datasheets' peaks are 3.35 and 4.8",
    "device memory answers after 1 µs under load": "an assumption, not a measurement: about twice what public "
    "micro-benchmarks report for an idle H100; with it 36 KB in flight per SM allow 4.9 TB/s, more than an H200 copies",
}
INEXACT = re.compile(r"\b(?:fma|sqrt|rsqrt|rcp|div|sin|cos|ex2|lg2|tanh)\.[a-z.]*f(?:16|32|64)\b")
"""PTX operations on floats other than the correctly rounded single ones."""


def analyse(variant: Variant, target: str = "sm_90") -> dict[str, Any]:
    """Figures of one variant on one NVIDIA target."""
    compiled = compile_variant(variant, target)
    read = profile(compiled.asm["cubin"], target, THREADS)
    return {
        "name": variant.name,
        "target": target,
        "bytes_per_parameter": variant.bytes_per_parameter,
        **per_parameter(variant, read),
        "inexact": sorted(set(INEXACT.findall(compiled.asm["ptx"]))),
        **dataclasses.asdict(read),
    }


def per_parameter(variant: Variant, read: Profile) -> dict[str, float]:
    """Instructions and loaded bytes per parameter. A loop that was unrolled handles several tiles in one turn."""
    elements = tile_of(variant.constants.get("MASKED", False)) // THREADS
    loaded = sum(read.widths["LDG"])
    unrolled = max(1, int(loaded // (elements * variant.bytes_read))) if variant.bytes_read else 1
    chunk = tile_of(False) * MOST_TILES // THREADS
    turns = max(1, chunk // (unrolled * elements))
    total = read.once_instructions + turns * read.tile_instructions
    tile = unrolled * elements
    return {
        "sass_per_parameter": total / chunk,
        "mufu_per_parameter": read.tile_mufu / tile,
        "special_per_parameter": (read.tile_mufu + read.tile_conversions) / tile,
        "integer_per_parameter": read.tile_integer / tile,
        "loaded_per_parameter": loaded / tile,
    }


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
ANCHORED = (BF16, BF16, "split16", "int8", "none")
ANCHOR_RANK, ANCHOR_EVERY = 64, 4
OTHERS = {
    "torch, fp32 gradients: fused AdamW 28 + clip_grad_norm_ 12 + boost by lerp 12 + dot 8": (60.0, "several"),
    "torch, fp32 gradients: fused AdamW alone": (28.0, "several"),
    "FlashOptim as published: bf16 + 8-bit correction, int8 m, v in groups of 32 with fp16 scales (no ĝ_G, no clip)": (
        2 + 2 * (2 + 1) + 2 * (2 + 4 / 32),
        "1 per tensor",
    ),
}
"""Bytes per parameter and launches; their kernels are elementwise and taken to run at copy bandwidth."""


def kernels_of(param: torch.dtype, grad: torch.dtype, kind: str, state: str, stored: str) -> list[Variant]:
    """The kernels of a whole step that touch every parameter: similarity and update; without ĝ_G the update alone."""
    update = step_variant(param, grad, kind, state, stored)
    return [update] if stored == "none" else [similarity_variant(grad, stored), update]


def whole_step_bytes(param: torch.dtype, grad: torch.dtype, kind: str, state: str, stored: str) -> float:
    """Bytes per parameter of :func:`kernels_of`, scales included."""
    return sum(kernel.bytes_per_parameter for kernel in kernels_of(param, grad, kind, state, stored))


def anchor_bytes(param: torch.dtype, grad: torch.dtype, kind: str) -> float:
    """Bytes per parameter that an anchored step moves beside the update, of matrices of one block (``anchored.py``).

    δ is written (fp32) from weight, remainder and θ₀, and read for P, Q and the addend λHδ; that is written, and
    a·g_D, widened, is added to it: the update reads fp32 gradients in place of ``grad``.
    """
    displacement = 2 * param.itemsize + PARAM_FORMATS[kind].bytes_per_parameter + 4
    widened = 0 if grad == FP32 else grad.itemsize + 4
    return displacement + 3 * 4 + 4 + widened + 3 * 4 + (4 - grad.itemsize)


def print_anchored(table: Table, known: dict[str, dict[str, Any]]) -> None:
    """The row of a step with the second-order memory, on average over ``ANCHOR_EVERY`` steps; eager fp32 matmuls."""
    param, grad, kind, *_ = ANCHORED
    kernels = [known.get(v.name) or analyse(v) for v in kernels_of(*ANCHORED)]
    extra = anchor_bytes(param, grad, kind)
    cells = []
    for gpu, rate in BANDWIDTH.items():
        plain = sum(predicted(kernel, gpu)[0] for kernel in kernels)
        products = 8 * ANCHOR_RANK / FLOPS  # P and Q 2 r flop per parameter each, the addend 4 r
        cells.append(f"{plain + (extra / rate + products) * 1e12 / ANCHOR_EVERY:.1f} (bandwidth, fp32 products)")
    name = f"bf16 split16, int8 m, v; memory of rank {ANCHOR_RANK}, every {ANCHOR_EVERY} steps"
    count = whole_step_bytes(*ANCHORED) + extra / ANCHOR_EVERY
    table.add_row(name, f"{count:.2f}", "about 12 per matrix when due", *cells)


def predicted(row: dict[str, Any], gpu: str) -> tuple[float, str]:
    """(µs per million parameters, the resource that binds) of an analysed kernel."""
    counts = {"issue": "sass", "integer": "integer", "special": "special"}
    times = {what: row[f"{key}_per_parameter"] / (SMS * CLOCK * PER_CLOCK[what]) for what, key in counts.items()}
    times["bandwidth"] = row["bytes_per_parameter"] / BANDWIDTH[gpu]
    times["latency"] = row["loaded_per_parameter"] * LATENCY / (SMS * row["bytes_in_flight"])
    binding = max(times, key=times.__getitem__)
    return times[binding] * 1e12, binding


def print_variants(console: Console, rows: list[dict[str, Any]]) -> None:
    title = f"Triton {triton.__version__}, {rows[0]['target']}; widths in bytes per thread and access"
    table = Table("variant", title=title)
    headings = ("B/param", "regs", "spill", "barriers", "KB in flight/SM", "SASS/param", "integer", "MUFU", "special")
    for heading in (*headings, "access, B"):
        table.add_column(heading, justify="right")
    for heading in ("H100 µs/M, predicted", "H200 µs/M, predicted"):
        table.add_column(heading)
    for r in rows:
        if not r["bytes_per_parameter"]:  # scalars of a step: nothing here is per parameter
            table.add_row(r["name"], "", str(r["registers"]), str(r["spill_bytes"]))
            continue
        widths = r["widths"]["LDG"] + r["widths"]["STG"]
        figures = [f"{r['bytes_per_parameter']:.2f}", *(str(r[key]) for key in ("registers", "spill_bytes"))]
        figures += [str(r["tile_barriers"])]
        figures += [f"{r['bytes_in_flight'] / 1024:.0f}", f"{r['sass_per_parameter']:.1f}"]
        figures += [f"{r[f'{kind}_per_parameter']:.2f}" for kind in ("integer", "mufu", "special")]
        figures += [f"{min(widths)}-{max(widths)}" if min(widths) < max(widths) else str(max(widths))]
        times = [f"{time:.1f} ({why})" for time, why in (predicted(r, gpu) for gpu in BANDWIDTH)]
        table.add_row(r["name"], *figures, *times)
    console.print(table)


def print_whole_steps(console: Console, known: dict[str, dict[str, Any]]) -> None:
    """``known``: variants analysed for sm_90, by name."""
    table = Table("whole step, bf16 gradients unless said", title="Bytes per parameter, scales included; launches")
    for heading in ("B/param", "launches", "H100 µs/M, predicted", "H200 µs/M, predicted"):
        table.add_column(heading, justify="right")
    for name, formats in OURS.items():
        kernels = [known.get(v.name) or analyse(v) for v in kernels_of(*formats)]
        cells = []
        for gpu in BANDWIDTH:
            times = [predicted(kernel, gpu) for kernel in kernels]
            cells.append(f"{sum(t for t, _ in times):.1f} ({', '.join(dict.fromkeys(why for _, why in times))})")
        # The sums' second stage, the coefficients. Ragged tensors and misaligned gradients have a launch more of both
        # kernels each.
        launches = len(kernels) + (2 if len(kernels) > 1 else 1)
        table.add_row(name, f"{whole_step_bytes(*formats):.2f}", str(launches), *cells)
    print_anchored(table, known)
    for name, (count, launches) in OTHERS.items():
        times = [f"{count / rate * 1e12:.1f} (bandwidth)" for rate in BANDWIDTH.values()]
        table.add_row(name, f"{count:.2f}", launches, *times)
    console.print(table)
    sources = Table("assumed", "source", title="What the predictions take for granted")
    for what, source in SOURCES.items():
        sources.add_row(what, source)
    console.print(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="regular expression: only variants whose name it finds")
    parser.add_argument("--targets", default="sm_90", help=f"comma-separated, or all: {', '.join(TARGETS)}")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of tables")
    arguments = parser.parse_args()
    targets = list(TARGETS) if arguments.targets == "all" else arguments.targets.split(",")
    chosen = [variant for variant in VARIANTS + OTHER_PATHS if re.search(arguments.match, variant.name)]
    console = Console(width=200)
    everything: list[dict[str, Any]] = []
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
        print_whole_steps(console, {row["name"]: row for row in everything if row["target"] == "sm_90"})


if __name__ == "__main__":
    main()

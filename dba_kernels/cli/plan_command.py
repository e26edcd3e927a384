"""``dba-kernels plan``: what fine-tuning a model will hold in memory, and how much general data it asks for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch

from dba_kernels.formats import STATE_FORMATS, is_compressible

from .cache_command import cache_note
from .grids import Grid
from .inspect_command import open_gradient
from .models import import_transformers, load_config
from .options import COUNT, FiniteRange, model_option
from .output import InputError
from .progress import wide_console
from .signal_to_noise import ENOUGH, batches_for, expected_cosine, per_batch
from .sizes import Shapes, Sizes

HELP = """Count the bytes that fine-tuning a model holds between steps, for every choice of formats.

Counted from the model's own shapes: one-dimensional and small tensors stay fp32. Weights, gradients, optimizer state
and the global gradient are counted; activations are not: they depend on your batch. No weights are needed: --model may
be a config.json, a folder with one, or a hub id.

With an existing global gradient it also says how many general batches its signal-to-noise asks for. The noise of a mean
falls as one over the number of batches n, so the signal-to-noise s = ‖μ‖² / E‖ĝ_G − μ‖² grows linearly, s(n) = n · s₁,
and the cosine with the true gradient is about √(s / (1 + s)): the cosine c takes n' = n · c² / (1 − c²) / s batches.

\b
Examples:
  dba-kernels plan --model org/name
  dba-kernels plan --model ./base/config.json --rank 128
  dba-kernels plan --model ./base --global-gradient general.safetensors --cosine 0.9
"""


@click.command("plan", help=HELP, short_help="Count bytes per parameter, and general batches, before you start.")
@model_option()
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="bf16", show_default=True, help="Of weights and gradients."
)
@click.option("--rank", type=COUNT, help="Also count a low-rank global gradient, factors in int8.")
@click.option("--curvature", type=COUNT, metavar="R", help="Also count an anchor with factors of rank R.")
@click.option("--global-gradient", type=click.Path(path_type=Path), metavar="FILE", help="What `collect` wrote.")
@click.option(
    "--cosine",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=ENOUGH,
    show_default=True,
    help="Cosine of the stored with the true gradient to plan for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
def command(
    model: str,
    dtype: str,
    rank: int | None,
    curvature: int | None,
    global_gradient: Path | None,
    cosine: float,
    as_json: bool,
) -> None:
    gradient = None if global_gradient is None else open_gradient(global_gradient, "--global-gradient")
    shapes, where = model_shapes(model)
    sizes = Sizes(shapes, torch.float32 if dtype == "fp32" else torch.bfloat16, rank, curvature)
    batches = None if gradient is None else batch_plan(gradient.signal_to_noise, gradient.provenance.batches, cosine)
    if as_json:
        click.echo(json.dumps({"model": where, "dtype": dtype, **sizes.as_dict(), "batches": batches}, indent=1))
        return
    console = wide_console()
    small = sum(math.prod(s) for s in shapes.values() if not is_compressible(s))
    console.print(
        f"{where}: {sizes.parameters:,} parameters in {len(shapes)} tensors, {small:,} of them in small or "
        f"one-dimensional ones, which stay fp32",
        soft_wrap=True,
    )
    if note := cache_note(where):
        console.print(note, soft_wrap=True)
    parts_table(sizes).show(console)
    totals_table(sizes).show(console)
    if batches is not None:
        console.print(batches["words"], soft_wrap=True)


def model_shapes(source: str) -> tuple[Shapes, str]:
    """Shapes of the parameters by name, tied ones once, from the configuration alone; and where it was read from.

    Raises:
        InputError: no such model, or not a causal language model.
    """
    config, where = load_config(source)
    with torch.device("meta"):
        try:
            model = import_transformers().AutoModelForCausalLM.from_config(config)
        except Exception as error:  # whatever a configuration with other numbers makes it throw
            reason = str(error).partition("\n")[0]  # what follows lists every class that transformers has
            raise InputError(f"--model: expected a causal language model, got {where!r}: {reason}") from error
    return {name: tuple(param.shape) for name, param in model.named_parameters()}, where


def parts_table(sizes: Sizes) -> Grid:
    """What each part costs."""
    table = Grid("Bytes between steps, part by part", ("part", "choice"), ("bytes/parameter", "MiB"))
    rows = [("weights", "", sizes.weights), ("gradients", "until zero_grad()", sizes.weights)]
    rows += [("--param-format", name, sizes.remainder(name)) for name in sizes.param_formats]
    rows += [("--state-format", name, sizes.state(name)) for name in STATE_FORMATS]
    rows += [("global gradient", name, size) for name, size in sizes.globals.items() if size]
    rows += [("anchor", f"rank {sizes.curvature}, int8, and θ₀", sizes.anchor)] if sizes.curvature else []
    previous = ""
    for part, choice, size in rows:
        table.add(part if part != previous else "", choice, f"{size / sizes.parameters:.3f}", _mib(size))
        previous = part
    return table


def totals_table(sizes: Sizes) -> Grid:
    """Bytes per parameter and MiB of every combination."""
    title = "All together, bytes per parameter (MiB), by format of the global gradient"
    shown = {name: size for name, size in sizes.globals.items() if name not in ("fp32", "fp16", "fp8_e4m3")}
    table = Grid(title, ("--param-format", "--state-format"), tuple(shown))
    for p in sizes.param_formats:
        for s in STATE_FORMATS:
            totals = [sizes.total(p, s, size) for size in shown.values()]
            table.add(p, s, *(f"{total / sizes.parameters:.2f} ({_mib(total)})" for total in totals))
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def batch_plan(signal_to_noise: float | None, batches: int, cosine: float) -> dict[str, Any]:
    """How many batches like those that were collected the cosine takes; ``words`` says it with the formula."""
    found: dict[str, Any] = {"collected": batches, "signal_to_noise": signal_to_noise, "cosine": cosine, "needed": None}
    each = found["signal_to_noise_per_batch"] = per_batch(signal_to_noise, batches)
    if signal_to_noise is None:
        words = "The file has no signal-to-noise estimate: collect at least two batches."
    elif signal_to_noise <= 0:
        words = (
            f"Signal-to-noise {signal_to_noise:.3g} after {batches:,} batches: too noisy to plan from; collect more."
        )
    else:
        needed = found["needed"] = batches_for(cosine, signal_to_noise, batches)
        words = (
            f"General batches: {batches:,} gave signal-to-noise {signal_to_noise:.3g}, {each:.3g} per batch (expected "
            f"cosine with the true gradient {expected_cosine(signal_to_noise):.3f}). It grows linearly in the number "
            f"of batches, so the cosine {cosine:g} takes n' = n · c² / (1 − c²) / s = {needed:,}"
            + ("; the file has enough." if needed <= batches else f": collect {needed - batches:,} more.")
        )
    return found | {"words": words}

"""``dba-kernels inspect``: what a stored global gradient holds, tensor by tensor."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dba_kernels import GlobalGradient

from .figures import require_matplotlib, save
from .gradient_figure import gradient_figure
from .output import InputError, write_whole
from .progress import wide_console
from .signal_to_noise import advice, per_batch
from .tables import Grid

HELP = """Show what a global gradient holds: every tensor, the totals, and where it comes from.

Only the file's headers are read, unless --verify asks for every byte.

\b
Columns:
  bytes    codes, scales and factors as stored
  norm     ‖ĝ_G‖ of what is stored
  error    ‖stored − exact‖ / ‖exact‖
  cosine   between stored and exact
  energy   share of ‖exact‖² that the best matrix of this rank keeps; 1 where the tensor is stored whole
  SNR      estimated ‖μ‖² / E‖ĝ_G − μ‖², μ the gradient over infinitely much such data; below 0: the noise hides it
  a batch  SNR per batch: files of different numbers of batches (of as many tokens) compare by it
Columns that do not fit the terminal are left out and named; --json has them all. Of the curvature, where there is any,
energy is the share of each factor's trace that its rank keeps.

\b
Examples:
  dba-kernels inspect general.safetensors
  dba-kernels inspect general.safetensors --plot general.png
  dba-kernels inspect general.safetensors --json | jq '.tensors[] | select(.signal_to_noise < 1) | .name'
"""


@click.command("inspect", help=HELP, short_help="Show what a global gradient holds.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="PNG", help="Draw norm, error and SNR, layer by layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.option("--verify", is_flag=True, help="Read everything and check each tensor's digest.")
def command(file: Path, plot: Path | None, as_json: bool, verify: bool) -> None:
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise InputError(f"--plot: expected a name that ends in .png, got {str(plot)!r}; rename it")
        require_matplotlib()
    gradient = open_gradient(file, verify=verify)
    if plot is not None:
        write_whole(plot, lambda path: save(gradient_figure(gradient), path))
    if as_json:
        click.echo(json.dumps(as_dict(gradient), indent=1, allow_nan=False))
        return
    console = wide_console()
    if len(gradient):
        tensor_table(gradient).show(console)
    if gradient.curvature_records:
        curvature_table(gradient).show(console)
    for line in summary(gradient):
        console.print(line, soft_wrap=True, highlight=False)
    if verify:
        console.print(f"verified: the digests of all {len(gradient)} tensors are right")
    if plot is not None:
        console.print(f"file: {plot}", soft_wrap=True)


def open_gradient(path: Path, option: str = "", verify: bool = False) -> GlobalGradient:
    """The stored gradient.

    Args:
        option: that gave the path, for messages.
        verify: read every tensor, too.

    Raises:
        InputError: no such file, not one, or damaged.
    """
    given = f"{option}: " if option else ""
    try:
        if path.is_dir():
            raise InputError(f"{given}expected a file that `collect` wrote, got the folder {str(path)!r}")
        if verify:
            GlobalGradient.load(path).verify()  # the one that is returned verifies again what is read of it
        return GlobalGradient.load(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{given}expected a file that `collect` wrote, there is no {str(error.filename or path)!r}"
        ) from error
    except (OSError, ValueError) as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise InputError(f"{given}{named}{error}") from error


def tensor_bytes(gradient: GlobalGradient) -> dict[str, int]:
    """Stored bytes of each tensor; the file is mapped, so nothing but headers is read."""
    one = {name: GlobalGradient({name: r}, {}, gradient.provenance, "") for name, r in gradient.records.items()}
    return {name: single.nbytes for name, single in one.items()}


def as_dict(gradient: GlobalGradient) -> dict[str, Any]:
    """Everything that the table shows, and the records' other fields."""
    sizes = tensor_bytes(gradient)
    tensors = [
        {"name": name, **asdict(r), "bytes": sizes[name], "norm": math.sqrt(r.squared_norm)}
        | {"signal_to_noise": r.signal_to_noise, "split_half_cosine": r.split_half_cosine}
        for name, r in gradient.records.items()
    ]
    return {
        "path": str(gradient.path),
        "digest": gradient.digest,
        "library_version": gradient.library_version,
        "parameters": parameters(gradient),
        "bytes": gradient.nbytes,
        "signal_to_noise": gradient.signal_to_noise,
        "signal_to_noise_per_batch": per_batch(gradient.signal_to_noise, gradient.provenance.batches),
        "provenance": asdict(gradient.provenance),
        "tensors": tensors,
        "calibration": gradient.calibration,
        "curvature": {
            name: asdict(r) | {"energy": r.energy, "bytes": r.nbytes} for name, r in gradient.curvature_records.items()
        },
    }


def parameters(gradient: GlobalGradient) -> int:
    return sum(math.prod(r.shape) for r in gradient.records.values())


def tensor_table(gradient: GlobalGradient) -> Grid:
    values = ("shape", "format", "bytes", "norm", "error", "cosine", "energy", "SNR", "a batch")
    least = ("bytes", "energy", "norm", "cosine", "shape", "a batch", "format")
    table = Grid(str(gradient.path), ("tensor",), values, least, "--json")
    sizes = tensor_bytes(gradient)
    for name, r in gradient.records.items():
        kind = f"rank {r.rank}, {r.format}" if r.rank else r.format
        norm = f"{math.sqrt(r.squared_norm):.3e}"
        measures = (f"{r.relative_error:.2e}", f"{r.cosine:.6f}", f"{r.energy:.4f}" if r.rank else "1")
        snr = (r.signal_to_noise, per_batch(r.signal_to_noise, gradient.provenance.batches - r.dropped))
        known = ("–" if figure is None else f"{figure:.3g}" for figure in snr)
        table.add(name, _shape(r.shape), kind, f"{sizes[name]:,}", norm, *measures, *known)
    return table


def curvature_table(gradient: GlobalGradient) -> Grid:
    """Per parameter: what its curvature is made of, and the share of the trace that the factors' rank keeps."""
    values, least = ("shape", "rows", "columns", "bytes", "energy"), ("bytes", "shape", "columns")
    table = Grid("curvature of the general loss, H", ("tensor",), values, least, "--json")
    for name, r in gradient.curvature_records.items():
        if not r.terms:
            kind = "diagonal" if r.diagonal else "multiple of 1"
            table.add(name, _shape(r.shape), kind, "–", f"{r.nbytes:,}", "–")
        for left, right in r.terms:
            sides = [f"rank {f.rank}, {f.format}" if f.rank else "diagonal" for f in (left, right)]
            kept = " × ".join(f"{f.energy:.3f}" for f in (left, right))
            table.add(name, _shape(r.shape), *sides, f"{r.nbytes:,}", kept)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def summary(gradient: GlobalGradient) -> list[str]:
    """Totals, provenance and what the signal-to-noise says."""
    records, p, numel = gradient.records.values(), gradient.provenance, parameters(gradient)
    norm = math.sqrt(math.fsum(r.squared_norm for r in records))
    # ‖exact‖² of a tensor is not recorded; to first order it is ‖stored‖², by which its error is weighed here.
    error = math.sqrt(math.fsum(r.squared_norm * r.relative_error**2 for r in records)) / norm if norm else 0.0
    left_out = [f"{p.dropped_batches:,} not finite"] if p.dropped_batches else []
    left_out += [f"{p.empty_batches:,} without targets"] if p.empty_batches else []
    noted = f" ({', '.join(left_out)} left out)" if left_out else ""
    known = "not measured" if gradient.calibration is None else f"{gradient.calibration:.3g}"
    second = [f"curvature: {gradient.curvature_nbytes:,} bytes, calibration {known}"]
    if not len(gradient):
        return [*second, *_origin(gradient)]
    return [
        f"{len(gradient):,} tensors, {numel:,} parameters, {gradient.nbytes:,} bytes "
        f"({gradient.nbytes / max(numel, 1):.3f} per parameter), norm {norm:.4g}, relative error ≈ {error:.2e}",
        f"mean of {p.batches:,} batches{noted}, {p.tokens:,} target tokens, weighted by {p.weighting}",
        *_origin(gradient),
        *(second if gradient.curvature_records else []),
        advice(gradient),
    ]


def _origin(gradient: GlobalGradient) -> list[str]:
    return [
        f"data: {'; '.join(gradient.provenance.data) or 'not named'}",
        f"digest {gradient.digest[:16]}…, written by dba_kernels {gradient.library_version}",
    ]

"""``python -m bench.fuzz``: run the command line on spoilt files and drawn options, and print what it should not do."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import matplotlib.figure  # noqa: F401  the slow imports, before the forks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from . import seeds
from .drawing import draw
from .judging import findings, run


@click.command()
@click.option("--runs", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Everything that is drawn follows from it.")
@click.option("--only", type=int, multiple=True, help="These runs alone, and all that they print.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for one run.")
def main(runs: int, seed: int, only: tuple[int, ...], timeout: float) -> None:
    """Exit status 1 if there is a finding."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    ends: Counter[tuple[str, str]] = Counter()
    found = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        first = Path(name) / "seeds"
        first.mkdir()
        seeds.make(first)
        click.echo(f"seed set made in {time.perf_counter() - started:.0f} s")
        started = time.perf_counter()
        for number in only or range(runs):
            folder = Path(name) / f"run-{number}"
            case = draw(number, seed, first, folder)
            end = run(case, folder, timeout)
            ends[case.command, "succeeded" if end.status == 0 else "refused"] += 1
            wrong = findings(case, end, folder, first)
            for what in wrong:
                click.echo(f"FINDING {number}: {what}\n    dba-kernels {str(case).replace(f'{folder}/', '')}")
            if only:
                click.echo(f"{number}: dba-kernels {case}\n{end.printed}{end.said}status {end.status}")
            found += bool(wrong)
            shutil.rmtree(folder, ignore_errors=True)
    seconds = (time.perf_counter() - started) / len(only or range(runs))
    for (command, outcome), count in sorted(ends.items()):
        click.echo(f"{command:<9} {outcome:<9} {count:>6}")
    click.echo(f"seed {seed}: {sum(ends.values())} runs, {seconds:.2f} s each, {found} with findings")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

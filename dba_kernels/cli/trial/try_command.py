"""``dba-kernels try``: short runs with and without a global gradient on a user's own model and text, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dba_kernels import GlobalGradient

from ..cache_command import cache_note
from ..figures import require_matplotlib, save
from ..grids import Grid
from ..inspect_command import open_gradient
from ..options import (
    COUNT,
    DATA_HELP,
    ROWS,
    DataOptions,
    FiniteRange,
    PathsCommand,
    data_options,
    model_option,
    paths_option,
)
from ..output import InputError, new_folder, prepare_folder, write_whole
from ..packing import Batch
from ..progress import progress, wide_console
from ..signal_to_noise import advice
from ..text import Corpus
from ..workload import Workload, load
from .figure import trial_figure
from .parts import Budget, Part, split
from .runs import AL, BOOSTED, HALF, REMEMBERED, REPLAY, Texts, Trial, arms_of
from .verdict import Interval, Point, at_equal_domain_loss, in_words

HELP = f"""Does a global gradient help my model? Short runs on your own text, and a plain verdict.

From the same base and with the same domain batches: AL (AdamW, learning rate falling linearly to 0) at --lr and at half
of it, DBA with the defaults, with --curvature (or a file that has it) DBA with the memory, and replay, which mixes as
much general text into every step and so reads twice as many tokens. Every seed has its own documents to train on and
its own held-out ones. General loss is compared at equal domain loss: AL's is read off between the base model and its
two rates, and beyond them along the same line. ± is the 95 % interval over seeds.

\b
Examples:
  dba-kernels try --model ./base --general general.jsonl --domain domain.jsonl
  dba-kernels try --model ./base --general general.jsonl --domain domain.jsonl --tokens 5000000 --seeds 5 --curvature 64
  dba-kernels try --model ./base --general general.jsonl --domain domain.jsonl --global-gradient general.safetensors

{DATA_HELP}
"""

TOKENS_IN_ALL = click.IntRange(1, 2**50)


@dataclass(frozen=True)
class Options(DataOptions):
    """The command's options; their meaning stands in its ``--help``."""

    model: str
    general: tuple[str, ...]
    domain: tuple[str, ...]
    global_gradient: Path | None
    curvature: int | None
    tokens: int
    seeds: int
    lr: float
    batch: int
    out: Path


@click.command("try", cls=PathsCommand, help=HELP, short_help="Does a global gradient help my model? Short runs say.")
@model_option()
@paths_option("--general", True, "General text, to be kept; see above.")
@paths_option("--domain", True, "Domain text, to be learned; see above.")
@click.option("--global-gradient", type=click.Path(path_type=Path), metavar="FILE", help="Use it; do not collect one.")
@click.option("--curvature", type=COUNT, metavar="R", help="Also collect and try the memory, of rank R.")
@click.option("--tokens", type=TOKENS_IN_ALL, default=1_000_000, show_default=True, help="To be read in all.")
@click.option("--seeds", type=click.IntRange(2, 20), default=4, show_default=True, help="Runs of each method.")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=3e-5, show_default=True, help="η₀; falls to 0.")
@click.option("--batch", type=ROWS, default=4, show_default=True, help="Rows per step.")
@click.option("--out", type=click.Path(path_type=Path), default="dba-try", show_default=True, help="Folder of results.")
@data_options
def command(**options: Any) -> None:
    chosen = Options(**options)
    with new_folder(chosen.out):
        run_trial(chosen, wide_console())


def run_trial(options: Options, console: Console) -> None:
    """The whole command.

    Raises:
        InputError: bad input, a budget that is too small, or a folder that cannot be written.
    """
    require_matplotlib()
    gradient = None
    if options.global_gradient is not None:
        gradient = open_gradient(options.global_gradient, "--global-gradient", verify=True)
        if options.curvature is not None:
            raise InputError("--curvature: leave it out with --global-gradient, whose curvature is used if it has any")
    has = (True, options.curvature is not None) if gradient is None else (len(gradient) > 0, _remembers(gradient))
    arms = arms_of(*has)
    passes = len(arms) + 1  # replay reads twice as many
    budget = Budget.of(options.tokens, options.batch * options.length, passes, options.seeds, gradient is None)
    corpora = {kind: Corpus(getattr(options, kind), options.field) for kind in ("domain", "general")}
    parts = {kind: split(corpus, options.seeds, options.seed, f"--{kind}") for kind, corpus in corpora.items()}
    prepare_folder(options.out)
    work = load(options.model, options.dtype, options.device, console)
    if note := cache_note(work.source):
        console.print(note, soft_wrap=True)
    if gradient is not None:
        try:
            gradient.check_model(work.model.named_parameters())
        except ValueError as error:
            raise InputError(f"--global-gradient: {error}") from error
    console.print(
        f"budget   {options.tokens:,} tokens: {budget.steps} steps of {options.batch} x {options.length} tokens for "
        f"each of {len(arms)} methods x {options.seeds} seeds, {budget.collected} batches for ĝ_G, "
        f"{budget.held_out} held-out batches per corpus and seed at most",
        soft_wrap=True,
    )
    trial = Trial(work, options.lr, budget.steps)
    with progress(console) as bars:
        tokens = options.batch * options.length
        if gradient is None:
            task = bars.add_task("global gradient", total=budget.collected, tokens=tokens)
            every = [index for part in parts["general"][0] for index in part.indices]
            stream = _stream(options, work, Part(corpora["general"], every), 0, repeat=True)
            named = ", ".join(options.general)
            gradient = trial.collect(
                islice(stream, budget.collected), options.curvature, named, partial(bars.advance, task)
            )
            gradient = _saved(gradient, options.out / "global_gradient.safetensors")
        points: dict[str, list[Point]] = {"base": [], **{arm: [] for arm in arms}}
        task = bars.add_task("runs", total=budget.steps * len(arms) * options.seeds, tokens=tokens)
        for seed in range(options.seeds):
            texts = _texts(options, work, {kind: (t[seed], h[seed]) for kind, (t, h) in parts.items()}, budget, seed)
            points["base"].append(trial.measure_base(texts.held_out))
            for arm in arms:
                points[arm].append(trial.run(arm, texts, gradient, partial(bars.advance, task)))
    for note in trial.notes:
        console.print(f"note     {note}", soft_wrap=True)
    _report(options, budget, points, gradient, console)


def _remembers(gradient: GlobalGradient) -> bool:
    return bool(gradient.curvature_records)


def _saved(gradient: GlobalGradient, path: Path) -> GlobalGradient:
    try:
        gradient.save(path)
    except OSError as error:
        raise InputError(f"--out: {error}") from error
    return GlobalGradient.load(path)


def _stream(options: Options, work: Workload, part: Part, seed: int, repeat: bool) -> Iterator[Batch]:
    how = {"loss_on": options.loss_on, "length": options.length, "size": options.batch}
    return iter(work.batches(part, seed=options.seed + seed, repeat=repeat, **how))  # type: ignore[arg-type]


def _texts(options: Options, work: Workload, parts: dict[str, tuple[Part, Part]], budget: Budget, seed: int) -> Texts:
    """One seed's batches, to train on and held out."""
    held_out = {
        kind: list(islice(_stream(options, work, held, 0, repeat=False), budget.held_out))
        for kind, (_, held) in parts.items()
    }
    return Texts(
        lambda kind: _stream(options, work, parts[kind][0], seed, repeat=True),
        lambda: _stream(options, work, parts["general"][0], seed + 1, repeat=True),
        held_out,
    )


def _changes(points: dict[str, list[Point]], arm: str, corpus: int) -> Interval:
    """Change of one held-out loss from the base model, over seeds."""
    return Interval.of([p[corpus] - b[corpus] for p, b in zip(points[arm], points["base"], strict=True)])


def conclude(points: dict[str, list[Point]]) -> tuple[Grid, dict[str, Interval], list[str]]:
    """The table, each method's difference from AL at equal domain loss, and the verdicts, the last one plainest.

    Args:
        points: by method, "base" among them: held-out losses of each seed.
    """
    paths = list(zip(points["base"], points[HALF], points[AL], strict=True))
    compared = [arm for arm in points if arm not in ("base", AL, HALF)]
    differences = {arm: at_equal_domain_loss(points[arm], paths) for arm in compared}
    title = "change of the held-out loss from the base model, nats/token, ± 95 % over seeds"
    table = Grid(title, ("method",), ("domain", "general", "general − AL's at equal domain"))
    for arm in points:
        if arm != "base":
            shown = (str(_changes(points, arm, corpus)) for corpus in (0, 1))
            table.add(arm, *shown, str(differences[arm]) if arm in differences else "–")
    names = {REPLAY: "Replay of general text", REMEMBERED: "The memory", BOOSTED: "A global gradient"}
    by_al = _changes(points, AL, 0)
    order = [arm for arm in (REPLAY, REMEMBERED, BOOSTED) if arm in differences]
    verdicts = [in_words(names[arm], differences[arm], _changes(points, arm, 0), by_al) for arm in order]
    return table, differences, list(dict.fromkeys(verdicts))


def _report(
    options: Options, budget: Budget, points: dict[str, list[Point]], gradient: GlobalGradient, console: Console
) -> None:
    table, differences, verdicts = conclude(points)
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    results = {"options": chosen, "budget": asdict(budget), "losses": points, "verdict": verdicts} | {
        "at_equal_domain_loss": {arm: asdict(interval) for arm, interval in differences.items()}
    }
    text, picture = options.out / "results.json", options.out / "figure.png"
    write_whole(text, lambda path: path.write_text(json.dumps(results, indent=1)))
    write_whole(picture, lambda path: save(trial_figure(points, differences), path))
    table.show(console)
    if len(gradient):
        console.print(advice(gradient), soft_wrap=True)
    for path in (gradient.path, text, picture):
        console.print(f"file: {path}", soft_wrap=True)
    for verdict in verdicts:
        console.print(verdict, soft_wrap=True, highlight=False)

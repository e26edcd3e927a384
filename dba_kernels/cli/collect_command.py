"""``dba-kernels collect``: stage 1 on a user's own model and general text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dba_kernels import GlobalGradient, GlobalGradientCollector
from dba_kernels.collect import keeping
from dba_kernels.formats import STORAGE_FORMATS, storage_format

from .cache_command import cache_note
from .failures import Interruption, Stopped
from .options import COUNT, DATA_HELP, ROWS, DataOptions, PathsCommand, data_options, model_option, paths_option
from .output import InputError, new_folder, prepare_folder
from .packing import Batch, Batches
from .progress import progress, wide_console
from .ranks import Ranks
from .signal_to_noise import advice
from .text import Corpus
from .workload import Workload, load


@dataclass(frozen=True)
class Options(DataOptions):
    """The command's options; their meaning stands in its ``--help``."""

    model: str
    data: tuple[str, ...]
    batches: int
    storage: str
    rank: int | None
    curvature: int | None
    out: Path
    batch: int
    snapshot_every: int
    keep_snapshot: bool


HELP = f"""Average the gradient of general text, at learning rate zero, into one file.

Do this once per base model; `finetune` (or DBAAdamW in your own script) then takes the file for every domain. Weights
never move. Beside weights and activations it needs 4 bytes of memory per parameter, and as much disk for the snapshot.

\b
Examples:
  dba-kernels collect --model ./base --data general.jsonl --batches 200 --out general.safetensors
  dba-kernels collect --model org/name --data chats.jsonl articles/ --batches 500 --format int4 --out g.safetensors
  dba-kernels collect --model ./base --data general.jsonl --batches 200 --curvature 64 --out general.safetensors
  torchrun --nproc-per-node 4 -m dba_kernels collect --model ./base --data *.jsonl --batches 200 --out g.safetensors

{DATA_HELP}
Texts are packed into rows of --length tokens. Documents do not attend to each other, and you are told where the model's
architecture cannot keep them apart. Neither prompts, padding nor the tokens between documents count in the loss. The
same options give the same file.

A collection that was interrupted goes on where its last snapshot (beside --out) stands when the same command is given
again; Ctrl-C (or SIGTERM) writes one first, status 130. One that is finished says so, and goes on from there when it is
given more --batches: the snapshot stays, at 4 bytes per parameter, until you delete it or say --drop-snapshot. Under
torchrun each process takes every n-th batch, the sums are added up once, and the first process writes. At the end you
are told whether more batches are worth it.

With --curvature (64 is a good rank) the file also holds the second order of the general loss, with which `finetune`
holds the weights where general ability needs them (--anchor); with --format none it holds that alone.
"""


@click.command("collect", cls=PathsCommand, help=HELP, short_help="Average the gradient of general text into one file.")
@model_option()
@paths_option("--data", True, "General text; see above.")
@click.option("--batches", type=COUNT, required=True, help="Micro-batches to average, of all processes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, *.safetensors.")
@click.option("--format", "storage", type=click.Choice([*STORAGE_FORMATS, "none"]), default="int8", show_default=True)
@click.option("--rank", type=COUNT, help="Store matrices as U, σ, V of this rank where that is smaller.")
@click.option("--curvature", type=COUNT, metavar="R", help="Also the second order, factors of rank R.")
@click.option("--batch", type=ROWS, default=4, show_default=True, help="Rows per micro-batch.")
@click.option("--snapshot-every", type=COUNT, default=50, show_default=True, help="Micro-batches.")
@click.option(
    "--keep-snapshot/--drop-snapshot",
    default=True,
    show_default=True,
    help="Keep the sums beside --out, 4 bytes per parameter: with more --batches, the next call goes on from them.",
)
@data_options
def command(**options: Any) -> None:
    run(Options(**options), Ranks.from_environment())


def run(options: Options, ranks: Ranks) -> None:
    """The whole command.

    Raises:
        InputError: bad input, or a file that cannot be written.
    """
    console = wide_console(quiet=not ranks.first)
    if options.out.suffix != ".safetensors":
        raise InputError(f"--out: expected a name that ends in .safetensors, got {str(options.out)!r}; rename it")
    with new_folder(options.out.parent):
        corpus = Corpus(options.data, options.field)
        work = load(options.model, options.dtype, options.device, console, ranks.local)
        if note := cache_note(work.source):
            console.print(note, soft_wrap=True)
        console.print(f"data     {', '.join(corpus.names)} ({len(corpus):,} documents)", soft_wrap=True)
        batches = work.batches(
            corpus, loss_on=options.loss_on, length=options.length, size=options.batch, seed=options.seed, repeat=False
        )
        if _finished(options, ranks, work, batches, console):
            return
        _check_room(options, ranks, work)
        with ranks.group(work.device):
            gradient = _collect(options, ranks, work, batches, console)
            if ranks.first:
                try:
                    gradient.save(options.out)
                except OSError as error:
                    raise InputError(f"--out: {error}") from error
            ranks.wait()  # no snapshot goes before the file is there
            if not options.keep_snapshot:
                _snapshot(options, ranks).unlink(missing_ok=True)
    if note := str(batches.counts):
        console.print(note)
    _report(options, gradient, console)


def _names(options: Options, ranks: Ranks, work: Workload) -> tuple[str, ...]:
    """What the file says of its data: equal exactly where the same text becomes the same batches and gradients."""
    return (
        *options.data,
        f"field {options.field}",
        f"loss on {options.loss_on}",
        f"{options.batch} x {options.length} tokens per batch",
        f"seed {options.seed}",
        work.dtype,
        f"{ranks.world} processes",
    )


def _finished(options: Options, ranks: Ranks, work: Workload, batches: Batches, console: Console) -> bool:
    """Whether the file of this very command is there already.

    Raises:
        InputError: a file of another command is.
    """
    if not options.out.exists():
        return False
    try:
        old = GlobalGradient.load(options.out)
        old.check_model(work.model.named_parameters())
    except (OSError, ValueError) as error:
        raise InputError(f"--out: there is another file in its place ({error}); move it, or choose another") from error
    changed = _changed(options, old, _names(options, ranks, work))
    if changed:
        raise InputError(
            f"--out: {str(options.out)!r} was collected with other options ({changed}); move it, or choose another"
        )
    consumed = _consumed(old)
    if consumed < options.batches and sum(1 for _ in islice(batches, consumed + 1)) > consumed:
        anew = "" if _snapshot(options, ranks).exists() else ", from the first: its snapshot is gone"
        console.print(f"{options.out} holds {consumed:,} batches; collecting {options.batches:,}{anew}", soft_wrap=True)
        return False
    try:
        old.verify()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--out: it is there already, but damaged ({error}); move it, and give the command again"
        ) from error
    console.print("finished already: nothing to do; delete the file to collect again")
    if not options.keep_snapshot:
        _snapshot(options, ranks).unlink(missing_ok=True)
    _report(options, old, console)
    return True


def _changed(options: Options, old: GlobalGradient, names: tuple[str, ...]) -> str:
    """How the options differ from those that ``old`` was collected with."""
    if old.provenance.data != names:
        ours, theirs = (
            [n for n in a if n not in b] for a, b in ((names, old.provenance.data), (old.provenance.data, names))
        )
        return f"expected {', '.join(ours)!r}, got {', '.join(theirs)!r}"
    ranks = {r.rank for r in old.records.values() if r.rank}
    if ranks != ({options.rank} if options.rank else set()):
        return f"expected --rank {options.rank}, got {', '.join(map(str, ranks)) or None}"
    if _curvature_rank(old) != options.curvature:
        return f"expected --curvature {options.curvature}, got {_curvature_rank(old)}"
    if (len(old) == 0) != (options.storage == "none"):
        return f"expected --format {options.storage}, got {'none' if len(old) == 0 else 'a gradient'}"
    for name, r in old.records.items():
        if r.format != (options.storage if r.rank else storage_format(options.storage, r.shape).name):
            return f"expected --format {options.storage}, got {r.format} for {name!r}"
    if _consumed(old) > options.batches:
        return f"expected at most --batches {options.batches}, got {_consumed(old)}"
    return ""


def _curvature_rank(gradient: GlobalGradient) -> int | None:
    """The largest rank of a factor: smaller matrices have less."""
    records = gradient.curvature_records.values()
    return max((f.rank or 0 for r in records for term in r.terms for f in term), default=None)


def _consumed(gradient: GlobalGradient) -> int:
    p = gradient.provenance
    return p.batches + p.dropped_batches + p.empty_batches


def _snapshot(options: Options, ranks: Ranks) -> Path:
    part = f"-{ranks.rank}-of-{ranks.world}" if ranks.world > 1 else ""
    return options.out.with_name(f"{options.out.stem}.snapshot{part}.safetensors")


def _check_room(options: Options, ranks: Ranks, work: Workload) -> None:
    """Refuse snapshots of another number of processes, a rank that fits nothing, and a disk without room."""
    ours = {_snapshot(options, Ranks(rank, ranks.world)) for rank in range(ranks.world)}
    found = set(options.out.parent.glob(f"{options.out.stem}.snapshot*.safetensors"))
    if others := sorted(found - ours):
        raise InputError(
            f"{others[0]}: expected no snapshot, or one of {ranks.world} processes, got this one; start as many "
            "processes as began the collection, or delete its snapshots"
        )
    shapes = {name: tuple(p.shape) for name, p in work.model.named_parameters()}
    if options.storage == "none" and options.curvature is None:
        raise InputError("--format: expected a format, got none without --curvature: nothing would be kept")
    kept = "int8" if options.storage == "none" else options.storage
    try:
        GlobalGradient.from_tensors(iter(()), kept, options.rank, shapes=shapes)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    stored = STORAGE_FORMATS[kept].bytes_per_parameter * work.parameters
    snapshots = 0 if found else 4 * work.parameters * ranks.world
    prepare_folder(options.out.parent, int(1.01 * (stored + snapshots)) + (1 << 20))


def _collect(options: Options, ranks: Ranks, work: Workload, batches: Batches, console: Console) -> GlobalGradient:
    mine = islice(batches, ranks.rank, options.batches, ranks.world)
    share = len(range(ranks.rank, options.batches, ranks.world))
    snapshot = _snapshot(options, ranks)
    try:
        collector = GlobalGradientCollector(
            work.model,
            data=_names(options, ranks, work),
            snapshot_path=snapshot,
            snapshot_every=options.snapshot_every,
            curvature=options.curvature,
        )
        kept: list[Batch] = []
        if collector.consumed:
            console.print(
                f"going on from {snapshot}: {collector.consumed:,} of {share:,} batches are done", soft_wrap=True
            )
        with Interruption() as stop, collector, progress(console) as bars:
            tokens = options.batch * options.length * ranks.world
            task = bars.add_task("global gradient", total=share, tokens=tokens, completed=collector.consumed)
            for batch in collector.remaining(keeping(mine, kept)):
                collector.backward(*work.loss(batch))
                bars.advance(task)
                if stop.asked:
                    break
        if stop.asked:
            raise Stopped(
                f"stopped after {collector.consumed:,} of {share:,} batches, which {snapshot} holds; the same command "
                "goes on from there"
            )
        collector.reduce()  # from here on, consumed counts the batches of all processes
        if collector.consumed < options.batches:
            console.print(f"the data end after {collector.consumed:,} of {options.batches:,} batches")
        storage = None if options.storage == "none" else options.storage
        console.print(f"compressing to {options.storage} and measuring what that costs")
        gradient = collector.finish(storage, options.rank)
        if options.curvature is not None:
            console.print("calibrating the curvature along Adam's steps")
            collector.calibrate(gradient, kept, work.loss, ranks.everyone)
        return gradient
    except (OSError, ValueError) as error:
        raise InputError(str(error).replace("choose another snapshot_path", "choose another --out")) from error


def _report(options: Options, gradient: GlobalGradient, console: Console) -> None:
    p = gradient.provenance
    numel = sum(math.prod(r.shape) for r in (gradient.records or gradient.curvature_records).values())
    left_out = f", {p.dropped_batches} not finite" if p.dropped_batches else ""
    console.print(
        f"ĝ_G      {p.batches:,} batches{left_out}, {p.tokens:,} target tokens, {gradient.nbytes / 2**20:,.1f} MiB "
        f"({gradient.nbytes / numel:.2f} bytes per parameter)",
        soft_wrap=True,
    )
    if len(gradient):
        console.print(advice(gradient), soft_wrap=True)
    if gradient.curvature_records:
        known = "not measured" if gradient.calibration is None else f"{gradient.calibration:.3g}"
        console.print(
            f"H        rank {_curvature_rank(gradient)}, {gradient.curvature_nbytes / 2**20:,.1f} MiB of it; "
            f"calibration {known}",
            soft_wrap=True,
        )
    console.print(f"file: {options.out}", soft_wrap=True)
    if (kept := sorted(options.out.parent.glob(f"{options.out.stem}.snapshot*.safetensors"))) and options.keep_snapshot:
        size = sum(path.stat().st_size for path in kept) / 2**20
        console.print(
            f"kept: {', '.join(map(str, kept))} ({size:,.1f} MiB), for more --batches; the same command with "
            "--drop-snapshot deletes it",
            soft_wrap=True,
        )

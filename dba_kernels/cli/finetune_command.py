"""``dba-kernels finetune``: stage 2 on a user's own model and domain text."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from dba_kernels import GlobalGradient
from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS
from dba_kernels.schedule import ANCHORS, BOOSTS

from .cache_command import cache_note
from .checkpoint import check_settings, has_checkpoints
from .failures import Stopped
from .finetune_options import Options, settings_of
from .finetune_run import Training
from .held_out import HeldOut
from .inspect_command import open_gradient
from .options import COUNT, DATA_HELP, ROWS, FiniteRange, PathsCommand, data_options, model_option, paths_option
from .output import InputError, new_folder, prepare_folder, remove_partial
from .packing import Batch, Batches
from .progress import wide_console
from .ranks import Ranks
from .run_report import beginning
from .text import Corpus
from .workload import Workload, load

HELP = f"""Fine-tune a causal language model on domain text, boosted by a stored global gradient.

Full fine-tuning with DBAAdamW and a learning rate that falls linearly to 0. Without --global-gradient this is AdamW.

\b
Examples:
  dba-kernels finetune --model ./base --data domain.jsonl --global-gradient general.safetensors \\
      --steps 1000 --lr 1e-5 --out ./tuned --eval-data held-out.jsonl --general-eval-data general-held-out.jsonl
  dba-kernels finetune … --dtype bf16 --state-format int8 --param-format split16     least memory, exact weights
  dba-kernels finetune … --out ./tuned --resume                                      goes on after an interruption

{DATA_HELP}
Texts are packed into rows of --length tokens. Documents do not attend to each other, and you are told where the model's
architecture cannot keep them apart. Neither prompts, padding nor the tokens between documents count in the loss. Data
that are too short are repeated, in another order each time.

\b
--out holds, in the end:
  config.json, model.safetensors, tokenizer …   as save_pretrained writes them
  metrics.jsonl    a line a step: loss (nats per target token), lr, seconds, γ, φ, α …; where measured, the held-out
                   losses (eval_loss, general_eval_loss) and their changes from the start with standard errors
  figure.png       the same, drawn
  run.json         settings and outcome; it is there when all else is
and meanwhile checkpoints/, the newest two, each with its digest: a damaged one is named, and the one before it used.
Ctrl-C (or SIGTERM) ends the step and saves, status 130. A run that was stopped or killed and goes on with --resume ends
with the very weights of a run that was not. One whose loss or weights become NaN or infinite ends with status 1 and
keeps its last good checkpoint.
"""


@click.command("finetune", cls=PathsCommand, help=HELP, short_help="Fine-tune on domain text, boosted by that file.")
@model_option()
@paths_option("--data", True, "Domain text; see above.")
@click.option("--global-gradient", type=click.Path(path_type=Path), metavar="FILE", help="What `collect` wrote.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of results.")
@click.option("--steps", type=COUNT, required=True, help="T, optimizer steps.")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=1e-5, show_default=True, help="η₀; falls to 0.")
@click.option(
    "--warmup", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Steps before it falls."
)
@click.option("--weight-decay", type=FiniteRange(0), default=0.0, show_default=True, help="λ, decoupled.")
@click.option("--max-grad-norm", type=FiniteRange(0, min_open=True), help="Clip the domain gradient.")
@click.option("--batch", type=ROWS, default=8, show_default=True, help="Rows per optimizer step.")
@click.option("--micro-batch", type=ROWS, help="Rows at once; the rest is accumulated.  [default: all]")
@click.option(
    "--boost",
    default="auto",
    show_default=True,
    help="k₀: paper (200/T), auto (less at a large --lr), a number.",
)
@click.option("--boost-max", type=FiniteRange(0, 1), default=0.5, show_default=True, help="Largest γ.")
@click.option(
    "--correction",
    type=click.Choice(["cosine", "none", "agem", "pcgrad"]),
    default="cosine",
    show_default=True,
    help="What the similarity of domain and global gradient does.",
)
@click.option(
    "--anchor",
    default="auto",
    show_default=True,
    help="λ: how firmly the file's curvature, if it has any, holds the weights; auto: 0.04/η₀; 0: not at all.",
)
@click.option(
    "--anchor-every",
    type=COUNT,
    default=4,
    show_default=True,
    metavar="K",
    help="Every K-th step is anchored, K times as firmly; the others cost nothing more.",
)
@click.option("--state-format", type=click.Choice(STATE_FORMATS), default="fp32", show_default=True, help="Of m and v.")
@click.option(
    "--param-format",
    type=click.Choice(["auto", *PARAM_FORMATS]),
    default="auto",
    show_default=True,
    help="How bf16 weights keep small updates; auto is split16, the exact fp32 value.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute activations: less memory, more time.")
@paths_option("--eval-data", False, "Held-out domain text to measure the loss on: what is learned; as --data.")
@paths_option("--general-eval-data", False, "Held-out general text, measured apart: what is forgotten; as --data.")
@click.option("--eval-every", type=COUNT, default=100, show_default=True, help="Steps; also first and last.")
@click.option("--eval-batches", type=COUNT, default=16, show_default=True, help="At most so many.")
@click.option("--save-every", type=COUNT, default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, if there is one.")
@data_options
def command(**options: Any) -> None:
    if options["global_gradient"] is None:
        source = click.get_current_context().get_parameter_source
        for name in ("boost", "boost_max", "correction", "anchor", "anchor_every"):
            if source(name) is click.core.ParameterSource.COMMANDLINE:
                raise InputError(f"--{name.replace('_', '-')}: needs --global-gradient; without it this is AdamW")
    run(Options(**options))


def run(options: Options) -> None:
    """The whole command.

    Raises:
        InputError: bad input, or a folder that cannot be written.
    """
    if Ranks.from_environment().world > 1:
        raise InputError("finetune: expected one process, got several; use the Hugging Face Trainer with DBAAdamW")
    if options.warmup >= options.steps:
        raise InputError(f"--warmup: expected fewer than --steps {options.steps}, got {options.warmup}")
    if options.boost not in BOOSTS and not _is_number(options.boost):
        raise InputError(f"--boost: expected a number, 'auto' or 'paper', got {options.boost!r}")
    if options.anchor not in ANCHORS and not _is_number(options.anchor):
        raise InputError(f"--anchor: expected a number or 'auto', got {options.anchor!r}")
    console = wide_console()
    gradient = None
    if options.global_gradient is not None:
        with console.status("reading the global gradient"):
            gradient = open_gradient(options.global_gradient, "--global-gradient", verify=True)
    settings = settings_of(options, gradient)
    if _finished(options, settings, console):
        return
    with new_folder(options.out):
        remove_partial(options.out)
        try:
            _train(options, settings, gradient, console)
        except KeyboardInterrupt:  # outside the steps, which stop by themselves
            going_on = (
                "go on with the same command and --resume" if has_checkpoints(options.out) else "nothing was kept"
            )
            raise Stopped(f"stopped; {going_on}") from None


def _train(options: Options, settings: dict[str, Any], gradient: GlobalGradient | None, console: Console) -> None:
    corpus = Corpus(options.data, options.field)
    chosen = {"domain": options.eval_data, "general": options.general_eval_data}
    held_out = {kind: Corpus(paths, options.field) for kind, paths in chosen.items() if paths}
    torch.manual_seed(options.seed)
    work = load(options.model, options.dtype, options.device, console)
    _check_room(options, work)
    if options.gradient_checkpointing:
        work.checkpoint_activations()
    training = Training(options, work, gradient, settings, console)
    batches = _batches(options, work, corpus, options.batch, repeat=True)
    evaluation = HeldOut(work, _held_out(options, work, held_out), training.metrics()) if held_out else None
    if note := cache_note(work.source):
        console.print(note, soft_wrap=True)
    console.print(f"data     {', '.join(corpus.names)} ({len(corpus):,} documents)", soft_wrap=True)
    for line in beginning(options, work, gradient, batches):
        console.print(line, soft_wrap=True, highlight=False)
    training.run(batches, evaluation)
    if note := str(batches.counts):
        console.print(note)
    for line in training.finish():
        console.print(line, soft_wrap=True)


def _batches(options: Options, work: Workload, corpus: Corpus, size: int, repeat: bool) -> Batches:
    seed = options.seed if repeat else 0  # what is held out stays the same
    return work.batches(corpus, loss_on=options.loss_on, length=options.length, size=size, seed=seed, repeat=repeat)


def _held_out(options: Options, work: Workload, corpora: dict[str, Corpus]) -> dict[str, list[Batch]]:
    """The first ``--eval-batches`` of each kind of held-out text."""
    size = options.micro_batch or options.batch
    found = {kind: _batches(options, work, corpus, size, repeat=False) for kind, corpus in corpora.items()}
    return {kind: list(islice(batches, options.eval_batches)) for kind, batches in found.items()}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _finished(options: Options, settings: dict[str, Any], console: Console) -> bool:
    """Whether this very run is finished already.

    Raises:
        InputError: --out holds another run, or one that --resume was not given for.
    """
    done, started = options.out / "run.json", (options.out / "metrics.jsonl").exists()
    if not options.resume and done.exists():
        raise InputError(f"--out: {str(options.out)!r} holds a finished run; choose another folder, or delete it")
    if not options.resume and (started or has_checkpoints(options.out)):
        raise InputError(f"--out: {str(options.out)!r} holds an unfinished run; go on with --resume, or choose another")
    if not done.exists():
        return False
    try:
        found = json.loads(done.read_text())["settings"]
        check_settings(found, settings, done)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{done}: expected what a finished run wrote, got {error!r}; choose another --out") from error
    console.print(f"finished already: {options.out}", soft_wrap=True)
    return True


def _check_room(options: Options, work: Workload) -> None:
    """Refuse a disk without room for the model and three checkpoints: two kept, one being written."""
    weights = sum(p.nbytes for p in work.model.parameters())
    param_format = "split16" if options.param_format == "auto" else options.param_format
    remainder = PARAM_FORMATS[param_format].bytes_per_parameter if work.dtype == "bf16" else 0
    state = (STATE_FORMATS[options.state_format].bytes_per_parameter + remainder) * work.parameters
    prepare_folder(options.out, int(weights + 3 * (weights + state)) + (1 << 20))

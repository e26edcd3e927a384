"""``dba-kernels demo``: fine-tune a real model with AdamW and with DBA, side by side, and show what became of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from dba_kernels import DBAAdamW, GlobalGradient, collect_global_gradient
from dba_kernels.formats import STATE_FORMATS, STORAGE_FORMATS

from ..corpora import CORPORA, load_documents
from ..devices import autocast_dtype
from ..figures import require_matplotlib, save, short_name
from ..inspect_command import open_gradient
from ..model_checks import check_length
from ..models import load_model
from ..options import COUNT, ROWS, SEED, TOKENS, FiniteRange
from ..output import InputError, new_folder, prepare_folder, write_whole
from ..progress import Bars, progress, wide_console
from ..signal_to_noise import advice
from .blocks import Blocks, token_blocks
from .demo_options import MAX_STEPS, SECONDS, Options, Plan
from .report import Outcome, demo_figure, losses_table, verdict
from .training import Run, Speed, evaluate, fine_tune, measure_speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@click.command("demo")
@click.option("--model", help="Causal language model: folder, .gguf file or hub id.  [default: bundled SmolLM2-135M]")
@click.option("--general", default="wikipedia", show_default=True, help="General text; as --domain.")
@click.option(
    "--domain",
    default="recipes",
    show_default=True,
    help=f"Domain text: a file (.json, .jsonl, plain text), a folder of them, or a corpus: {', '.join(CORPORA)}.",
)
@click.option("--global-gradient", type=click.Path(path_type=Path), help="Use this stored ĝ_G; do not collect one.")
@click.option("--steps", type=COUNT, help=f"Optimizer steps of each run.  [default: {MAX_STEPS}, or fewer]")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=3e-5, show_default=True, help="η₀; falls to 0.")
@click.option(
    "--boost",
    type=FiniteRange(0, 1),
    default=0.5,
    show_default=True,
    help="k₀: γ falls from it to 0 (so does the library's default, at this --lr).",
)
@click.option("--correction", type=click.Choice(["cosine", "none"]), default="cosine", show_default=True, help="α.")
@click.option("--format", "storage", type=click.Choice(list(STORAGE_FORMATS)), default="int8", show_default=True)
@click.option("--state-format", type=click.Choice(STATE_FORMATS), default="fp32", show_default=True, help="DBA's m, v.")
@click.option("--batch-size", type=ROWS, default=4, show_default=True, help="Blocks per step.")
@click.option("--length", type=TOKENS, default=128, show_default=True, help="Tokens per block.")
@click.option(
    "--evaluation-blocks", type=click.IntRange(2, 2**20), help="Held out per corpus.  [default: 48, fewer if slow]"
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Order of the texts.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="dba-demo", show_default=True, help="Folder of results."
)
def command(**options: Any) -> None:
    """Fine-tune a language model with AdamW and with DBA, and compare what each learns and forgets.

    The gradient of general text is collected once and compressed to a file; it then boosts the fine-tuning on domain
    text. With the defaults this takes at most ten minutes on two idle cores: a slower machine does fewer steps.
    """
    chosen = Options(**options)
    with new_folder(chosen.out):
        run_demo(chosen, wide_console())


def run_demo(options: Options, console: Console) -> dict[str, Outcome]:
    """The whole demo; the outcomes by name. What can be refused is refused before the first long computation.

    Raises:
        InputError: bad input, or a folder that cannot be written.
    """
    started = time.perf_counter()
    require_matplotlib()
    prepare_folder(options.out)
    model, blocks = _load(options, console)
    stored = _stored_gradient(options, model)
    if stored is None:
        expected = STORAGE_FORMATS[options.storage].bytes_per_parameter * sum(p.numel() for p in model.parameters())
        prepare_folder(options.out, int(1.01 * expected) + (16 << 20))
    plan, speed = _plan(options, model, blocks, console)
    planned = time.perf_counter()

    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcomes = {}
    with progress(console) as bar:
        outcomes["base"] = _outcome(model, blocks, options, plan, bar, "base", None)
        gradient = stored or _collect(model, blocks["general"], options, plan, bar)
        if speed is not None and (fewer := plan.revised(time.perf_counter() - planned, speed, options)) != plan:
            bar.console.print(f"slower than expected: {fewer.steps} steps in place of {plan.steps}, to stay within ten")
            plan = fewer
        adamw = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
        outcomes["AdamW"] = _fine_tuned(model, adamw, blocks, options, plan, bar, "AdamW")
        model.load_state_dict(base)
        del adamw, base
        dba = DBAAdamW(
            model.named_parameters(),
            lr=options.lr,
            global_gradient=gradient,
            total_steps=plan.steps,
            boost=options.boost,
            boost_max=1.0,  # --boost is the largest γ
            correction=options.correction,
            state_format=options.state_format,
        )
        outcomes["DBA"] = _fine_tuned(model, dba, blocks, options, plan, bar, "DBA", gradient.nbytes)
    _report(outcomes, gradient, options, plan, console, time.perf_counter() - started)
    return outcomes


def _load(options: Options, console: Console) -> tuple[PreTrainedModel, dict[str, Blocks]]:
    """The model on its device, and the blocks of both corpora ("domain", "general")."""
    documents = {name: load_documents(getattr(options, name)) for name in ("domain", "general")}
    with console.status("loading the model (a .gguf file is converted the first time: about a minute)"):
        model, tokenizer, source = load_model(options.model)
    check_length(model.config, options.length)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()  # no dropout: the runs can be compared
    console.print(f"model    {source} ({sum(p.numel() for p in model.parameters()):,} parameters)", soft_wrap=True)
    wanted = (options.steps or MAX_STEPS) * options.batch_size
    held_out = Plan.of(options.steps or MAX_STEPS, options).evaluation_blocks
    blocks = {}
    for name, (texts, path) in documents.items():
        cut = token_blocks(tokenizer, texts, length=options.length, train=wanted, held_out=held_out, seed=options.seed)
        note = f"; {len(cut.train):,} blocks of text, repeated" if len(cut.train) < wanted else ""
        console.print(f"{name:<8} {path} ({len(texts):,} documents{note})", soft_wrap=True)
        blocks[name] = cut
    return model, blocks


def _stored_gradient(options: Options, model: PreTrainedModel) -> GlobalGradient | None:
    """The ĝ_G that the user gave, checked against the model."""
    if options.global_gradient is None:
        return None
    gradient = open_gradient(options.global_gradient, "--global-gradient", verify=True)
    try:
        gradient.check_model(model.named_parameters())
    except (OSError, ValueError) as error:
        raise InputError(f"--global-gradient: {error}") from error
    return gradient


def _plan(
    options: Options, model: PreTrainedModel, blocks: dict[str, Blocks], console: Console
) -> tuple[Plan, Speed | None]:
    """The plan, and the speed that decided it where ``--steps`` did not."""
    if options.steps is not None:
        return Plan.of(options.steps, options), None
    domain = blocks["domain"]
    with console.status("measuring the speed of this machine"):
        speed = measure_speed(model, domain.train[: options.batch_size], domain.held_out[: options.batch_size])
    plan = Plan.within(SECONDS, speed, options)
    rate = options.batch_size * options.length / speed.batch
    console.print(
        f"budget   {rate:,.0f} tokens/s here: {plan.steps} steps, about {plan.seconds(speed, options) / 60:.0f} minutes"
        + (f" (fewer than {MAX_STEPS}, to stay within ten)" if plan.steps < MAX_STEPS else ""),
        soft_wrap=True,
    )
    return plan, speed


def _batches(blocks: torch.Tensor, size: int, count: int) -> Iterator[torch.Tensor]:
    """``count`` batches ``[size, length]`` in order, starting again where the text ends."""
    for first in range(0, count * size, size):
        yield blocks[torch.arange(first, first + size) % len(blocks)]


def _collect(model: PreTrainedModel, blocks: Blocks, options: Options, plan: Plan, bar: Bars) -> GlobalGradient:
    """Stage 1: ĝ_G over general text (eq. 1), saved, and read back from the file as any later run would."""
    batches = _batches(blocks.train, options.batch_size, plan.global_batches)
    task = bar.add_task("global gradient", total=plan.global_batches, tokens=options.batch_size * options.length)

    def counted() -> Iterator[dict[str, torch.Tensor]]:
        for ids in batches:
            yield {"input_ids": ids, "labels": ids}
            bar.advance(task)

    gradient = collect_global_gradient(
        model,
        counted(),
        format=options.storage,
        data=options.general,
        autocast_dtype=autocast_dtype(model.device),
    )
    path = options.file("global_gradient.safetensors")
    try:
        gradient.save(path)
    except OSError as error:
        raise InputError(str(error)) from error
    return GlobalGradient.load(path)


def _fine_tuned(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    blocks: dict[str, Blocks],
    options: Options,
    plan: Plan,
    bar: Bars,
    name: str,
    stored_bytes: int = 0,
) -> Outcome:
    """Stage 2 with either optimizer: the same batches in the same order, then the evaluation."""
    task = bar.add_task(f"{name}: fine-tuning", total=plan.steps, tokens=options.batch_size * options.length)
    batches = _batches(blocks["domain"].train, options.batch_size, plan.steps)
    run = fine_tune(model, batches, optimizer, plan.steps, lambda: bar.advance(task), stored_bytes)
    return _outcome(model, blocks, options, plan, bar, name, run)


def _outcome(
    model: PreTrainedModel,
    blocks: dict[str, Blocks],
    options: Options,
    plan: Plan,
    bar: Bars,
    name: str,
    run: Run | None,
) -> Outcome:
    size = options.batch_size
    task = bar.add_task(f"{name}: evaluation", total=2 * plan.evaluation_batches(options), tokens=size * options.length)
    domain, general = (
        evaluate(model, blocks[corpus].held_out[: plan.evaluation_blocks], size, lambda: bar.advance(task))
        for corpus in ("domain", "general")
    )
    bar.console.print(f"{name:<8} held-out loss: domain {domain.mean():.4f}, general {general.mean():.4f}")
    return Outcome(domain, general, run)


def _report(
    outcomes: dict[str, Outcome],
    gradient: GlobalGradient,
    options: Options,
    plan: Plan,
    console: Console,
    seconds: float,
) -> None:
    """Write the files, print the table, what it says, and where everything is."""
    tokens = plan.evaluation_blocks * (options.length - 1)  # the first token of a block is not predicted
    results = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "plan": asdict(plan),
        "evaluation_tokens": tokens,
        "seconds": seconds,
        "outcomes": {name: outcome.as_json() for name, outcome in outcomes.items()},
    }
    settings = f"{plan.steps} steps at η₀ = {options.lr:g}, γ₀ = {options.boost:g}, seed {options.seed}"
    title = f"{short_name(options.domain)}: {settings}"
    write_whole(options.file("results.json"), lambda path: path.write_text(json.dumps(results, indent=1)))
    write_whole(options.file("figure.png"), lambda path: save(demo_figure(outcomes, title), path))
    losses_table(outcomes, tokens, title).show(console)
    console.print(verdict(*outcomes.values()))
    provenance, parameters = gradient.provenance, sum(math.prod(r.shape) for r in gradient.records.values())
    console.print(
        f"ĝ_G: mean gradient of {provenance.tokens:,} tokens, {gradient.nbytes / 2**20:,.0f} MiB "
        f"({gradient.nbytes / parameters:.2f} bytes per parameter). Took {seconds / 60:.1f} minutes.",
        soft_wrap=True,
    )
    console.print(advice(gradient), soft_wrap=True)
    for path in (gradient.path, options.file("results.json"), options.file("figure.png")):
        console.print(f"file: {path}", soft_wrap=True)

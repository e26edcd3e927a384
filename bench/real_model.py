"""``python -m bench.real_model``: the small-model study's question, asked of a real model.

SmolLM2-135M-Instruct (from 4-bit weights) is fine-tuned on recipes by each method, with the same domain batches, then
measured on held-out recipes, Wikipedia introductions (the kind that the global gradient was collected on) and medical
definitions (a kind that no method sees). Finished runs are kept in ``--output`` and not repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from bench import jsonl
from dba_kernels import DBAAdamW, GlobalGradient, collect_global_gradient
from dba_kernels.cli.corpora import load_documents
from dba_kernels.cli.demo.blocks import token_blocks
from dba_kernels.cli.demo.training import evaluate, fine_tune
from dba_kernels.cli.devices import autocast_dtype
from dba_kernels.cli.models import load_model
from dba_kernels.cli.progress import progress
from dba_kernels.cli.signal_to_noise import advice
from dba_kernels.schedule import initial_boost

RESULTS = Path(__file__).with_name("real_model.jsonl")
DOMAIN, GENERAL, OTHER = "recipes", "wikipedia", "medical"
STEPS, LONG, BATCH, LENGTH, LR = 32, 160, 4, 128, 3e-5
COLLECTED = 24  # batches of the global gradient
HELD_OUT = 48  # blocks of each corpus
SEEDS = (0, 1, 2)  # each has its own domain blocks; long runs are made once
DEFAULT = initial_boost("auto", STEPS, LR)  # labels name it: under another default, rows are run again
AL = "AL: AdamW, linear decay"
INTERPOLATED = "AL, half-way back to the base (WiSE-FT)"
METHODS: dict[str, dict[str, Any]] = {  # "boost" takes the global gradient; "replay": general blocks in each batch
    AL: {},
    "DBA, k₀ = 0.05": {"boost": 0.05},
    f"DBA, k₀ = {DEFAULT:g} (default)": {"boost": DEFAULT},
    "replay, one general block to four": {"replay": 1},
    "replay, one to one": {"replay": 4},
    "AL, after training on the batches of ĝ_G": {"first": True},
    f"AL, {LONG} steps": {"steps": LONG},
    f"DBA, k₀ = {DEFAULT:g}, {LONG} steps": {"boost": DEFAULT, "steps": LONG},
}

Advance = Callable[[], None]
Done = dict[tuple[str, int], dict[str, float]]  # losses of the finished runs by method and seed


class Study:
    """The model, its base weights, and the blocks ``[n, LENGTH]`` of each corpus."""

    def __init__(self) -> None:
        self.model, tokenizer, _ = load_model()
        self.model.eval()  # no dropout: the runs can be compared
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        wanted = {
            DOMAIN: max(len(SEEDS) * STEPS, LONG) * BATCH,
            GENERAL: (COLLECTED + len(SEEDS) * STEPS) * BATCH,
            OTHER: 1,
        }
        self.blocks = {
            name: token_blocks(tokenizer, load_documents(name)[0], length=LENGTH, train=count, held_out=HELD_OUT)
            for name, count in wanted.items()
        }
        short = [name for name, count in wanted.items() if len(self.blocks[name].train) < count]
        assert not short, f"{', '.join(short)}: too little text"

    def collected(self) -> torch.Tensor:
        """The blocks that the global gradient is the mean over."""
        return self.blocks[GENERAL].train[: COLLECTED * BATCH]

    def collect(self, advance: Advance) -> GlobalGradient:
        def batches() -> Iterator[dict[str, torch.Tensor]]:
            for ids in self.collected().split(BATCH):
                yield {"input_ids": ids, "labels": ids}
                advance()

        dtype = autocast_dtype(self.model.device)
        return collect_global_gradient(self.model, batches(), format="int8", data=GENERAL, autocast_dtype=dtype)

    def batches(self, seed: int, steps: int, replay: int) -> Iterator[torch.Tensor]:
        domain = self.blocks[DOMAIN].train[seed * STEPS * BATCH :]
        general = self.blocks[GENERAL].train[COLLECTED * BATCH + seed * STEPS * replay :]
        for step in range(steps):
            mixed = general[step * replay : (step + 1) * replay]
            yield torch.cat([domain[step * BATCH : (step + 1) * BATCH], mixed])

    def train(
        self,
        gradient: GlobalGradient,
        seed: int,
        advance: Advance,
        boost: float | None = None,
        replay: int = 0,
        steps: int = STEPS,
        first: bool = False,
    ) -> None:
        self.model.load_state_dict(self.base)
        if first:
            self._run(self.collected().split(BATCH), COLLECTED, advance)
        boosted = {} if boost is None else dict(global_gradient=gradient, total_steps=steps, boost=boost)
        self._run(self.batches(seed, steps, replay), steps, advance, **boosted)

    def _run(self, batches: Iterable[torch.Tensor], steps: int, advance: Advance, **options: Any) -> None:
        optimizer = DBAAdamW(self.model.named_parameters(), lr=LR, weight_decay=0.0, **options)
        fine_tune(self.model, batches, optimizer, steps, advance)

    def interpolate(self, share: float) -> None:
        """θ₀ + share · (θ − θ₀)."""
        now = self.model.state_dict()
        self.model.load_state_dict({name: torch.lerp(self.base[name], now[name], share) for name in now})

    def losses(self, advance: Advance) -> dict[str, float]:
        """Mean held-out loss in nats per token of each corpus."""
        return {
            name: evaluate(self.model, blocks.held_out, BATCH, advance).mean().item()
            for name, blocks in self.blocks.items()
        }


def missing(done: Done) -> list[tuple[str, int]]:
    short = [(method, seed) for seed in SEEDS for method, settings in METHODS.items() if "steps" not in settings]
    wanted = [("base", 0), *short, *((method, 0) for method, settings in METHODS.items() if "steps" in settings)]
    return [run for run in wanted if run not in done]


def load(path: Path) -> Done:
    return {(record["method"], record["seed"]): record["losses"] for record in jsonl.load(path)}


def table(done: Done) -> str:
    """Markdown: change of each corpus' held-out loss from the base model, mean ± standard deviation over the seeds."""
    base = done["base", 0]
    lines = ["| | " + " | ".join(base) + " |", "|---" * (1 + len(base)) + "|"]
    lines += ["| base model | " + " | ".join(f"{loss:.3f}" for loss in base.values()) + " |"]
    for method in (*METHODS, INTERPOLATED):
        runs = [done[method, seed] for seed in SEEDS if (method, seed) in done]
        cells = []
        for name, start in base.items():
            changes = [run[name] - start for run in runs]
            spread = f" ± {statistics.stdev(changes):.3f}" if len(changes) > 1 else ""
            cells.append(f"{statistics.mean(changes):+.3f}{spread}" if changes else "–")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Finished runs, as JSON lines.")
def main(output: Path) -> None:
    """Run what is not in the output yet (on two idle cores 2 minutes a run, 7 a long one), then print the table."""
    console = Console()

    def keep(method: str, seed: int, losses: dict[str, float]) -> None:
        losses = {name: round(loss, 5) for name, loss in losses.items()}
        jsonl.append(output, {"method": method, "seed": seed, "losses": losses})
        console.print(f"{method}, seed {seed}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    if pending := missing(load(output)):
        study = Study()
        with progress(console) as bars:
            task = bars.add_task("global gradient", total=COLLECTED, tokens=BATCH * LENGTH)
            gradient = study.collect(lambda: bars.advance(task))
            console.print(advice(gradient))
            for method, seed in pending:
                settings = METHODS.get(method)
                steps = 0 if settings is None else settings.get("steps", STEPS) + COLLECTED * ("first" in settings)
                units = steps + (2 if method == AL else 1) * len(study.blocks) * HELD_OUT // BATCH
                task = bars.add_task(f"{method}, seed {seed}", total=units, tokens=BATCH * LENGTH)
                if settings is not None:
                    study.train(gradient, seed, lambda task=task: bars.advance(task), **settings)
                losses = study.losses(lambda task=task: bars.advance(task))
                if method == AL:
                    study.interpolate(0.5)
                    keep(INTERPOLATED, seed, study.losses(lambda task=task: bars.advance(task)))
                keep(method, seed, losses)
    print(table(load(output)))


if __name__ == "__main__":
    main()

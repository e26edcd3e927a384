"""``python -m bench.state_formats``: what compressed optimizer state costs in a real fine-tuning run.

SmolLM2-135M is fine-tuned on recipes by ``DBAAdamW`` (no global gradient: the question is the state), once per state
format, with the same batches. Against the run with fp32 state: the cosine of the whole displacement θ − θ₀, and the
change of the held-out domain loss. A deliberately bad codec (v rounded to uint8 linearly, so that small values
become 0 and the update explodes) must fail what int8 has to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from rich.console import Console
from rich.table import Table

import dba_kernels
from dba_kernels.cli.corpora import load_documents
from dba_kernels.cli.demo.blocks import token_blocks
from dba_kernels.cli.demo.training import evaluate, fine_tune
from dba_kernels.cli.models import load_model
from dba_kernels.cli.progress import progress
from dba_kernels.formats import GROUP

MIN_FALL = 0.10
"""The run must have learned something: relative fall of the held-out domain loss."""
MIN_COSINE = 0.99
MAX_CHANGE_ERROR = 0.05


def linear_codec(exp_avg_sq: torch.Tensor) -> torch.Tensor:
    """v in 256 equal steps of its group's maximum: what the library does not do."""
    rows, cols = exp_avg_sq.shape
    groups = torch.nn.functional.pad(exp_avg_sq, (0, -cols % GROUP)).view(rows, -1, GROUP)
    scale = (groups.amax(2, keepdim=True) / 255).clamp(min=1e-38)
    return ((groups / scale).round() * scale).flatten(1)[:, :cols]


def spoil(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for state in optimizer.state.values():
        if state["exp_avg_sq"].dim() == 2:
            state["exp_avg_sq"].copy_(linear_codec(state["exp_avg_sq"]))


@dataclass
class Result:
    loss: float
    displacement: torch.Tensor  # fp32 [n_params]
    bytes_per_parameter: float


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@click.command()
@click.option("--domain", default="recipes", show_default=True)
@click.option("--steps", default=40, show_default=True)
@click.option("--lr", default=3e-5, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--evaluation-blocks", default=48, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(domain: str, steps: int, lr: float, batch_size: int, length: int, evaluation_blocks: int, seed: int) -> None:
    """Compare state formats in a real fine-tuning run; exits with status 1 where a bound does not hold."""
    console = Console()
    model, tokenizer, where = load_model()
    documents, _ = load_documents(domain)
    blocks = token_blocks(
        tokenizer, documents, length=length, train=steps * batch_size, held_out=evaluation_blocks, seed=seed
    )
    batches = blocks.train[torch.arange(steps * batch_size) % len(blocks.train)].split(batch_size)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    origin = flat(model)
    model.eval()
    console.print(f"{where}: {origin.numel():,} parameters, {steps} steps of {batch_size} x {length} tokens, lr {lr:g}")

    def run(state_format: str, hook: Callable | None, bar: Callable[[], None]) -> Result:
        model.load_state_dict(start)
        optimizer = dba_kernels.DBAAdamW(model.named_parameters(), lr=lr, state_format=state_format)
        if hook is not None:
            optimizer.register_step_post_hook(hook)
        cost = fine_tune(model, batches, optimizer, steps, bar).bytes_per_parameter
        loss = evaluate(model, blocks.held_out, batch_size, bar).mean().item()
        return Result(loss, flat(model) - origin, cost)

    runs: dict[str, tuple[str, Callable | None]] = {
        "fp32": ("fp32", None),
        "bf16": ("bf16", None),
        "int8": ("int8", None),
        "linear v (bad)": ("fp32", spoil),
    }
    results: dict[str, Result] = {}
    units = steps + -(-evaluation_blocks // batch_size)
    with progress(console) as bars:
        task = bars.add_task("base", total=units - steps, tokens=batch_size * length)
        base = evaluate(model, blocks.held_out, batch_size, lambda: bars.advance(task)).mean().item()
        for name, (state_format, hook) in runs.items():
            task = bars.add_task(name, total=units, tokens=batch_size * length)
            results[name] = run(state_format, hook, lambda task=task: bars.advance(task))

    exact = results["fp32"]
    verdicts = {name: compare(result, exact, base) for name, result in results.items()}
    console.print(table_of(results, verdicts, base, evaluation_blocks * (length - 1)))
    fall = (base - exact.loss) / base
    sound = {
        f"domain loss falls by {fall:.1%}, at least {MIN_FALL:.0%}": fall >= MIN_FALL,
        f"int8: cosine >= {MIN_COSINE}, change within {MAX_CHANGE_ERROR:.0%}": passes(*verdicts["int8"]),
        "the bad codec fails the same check": not passes(*verdicts["linear v (bad)"]),
    }
    for claim, holds in sound.items():
        console.print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    raise SystemExit(0 if all(sound.values()) else 1)


def compare(result: Result, exact: Result, base: float) -> tuple[float, float]:
    """Cosine of the displacements, and the relative error of the change of loss."""
    cosine = torch.cosine_similarity(result.displacement.double(), exact.displacement.double(), dim=0).item()
    return cosine, abs(result.loss - exact.loss) / abs(base - exact.loss)


def passes(cosine: float, change_error: float) -> bool:
    return cosine >= MIN_COSINE and change_error <= MAX_CHANGE_ERROR  # NaN passes neither


def table_of(results: dict[str, Result], verdicts: dict[str, tuple[float, float]], base: float, tokens: int) -> Table:
    table = Table(title=f"Held-out domain loss over {tokens:,} tokens; base {base:.4f}", title_justify="left")
    for heading in ("state", "loss", "change", "error of change", "cosine of θ − θ₀", "bytes/parameter"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for name, result in results.items():
        cosine, error = verdicts[name]
        cells = (f"{result.loss:.4f}", f"{result.loss - base:+.4f}", f"{error:.2%}", f"{cosine:.5f}")
        table.add_row(name, *cells, f"{result.bytes_per_parameter:.2f}")
    return table


if __name__ == "__main__":
    main()

"""What the storage of bf16 weights costs in training: ``python -m bench.convergence``.

The 0.2 M model of ``bench.quality`` is trained from random weights on Wikipedia introductions (AdamW, warm-up, cosine
to 0), once with fp32 weights and once for every way to keep bf16 weights. All runs of a seed see the same batches and
compute their losses in fp32 from the stored weights; gradients have their weight's dtype. So the held-out losses differ
by what optimizers keep. Weights rounded to bf16 at every step ("native") are the negative control: their last, small
updates vanish.

Prints a Markdown table of differences from torch's fused AdamW in fp32: mean ± standard deviation over seeds.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor
from torch.func import functional_call

from bench.memory import PEERS
from dba_kernels import DBAAdamW

LR, BETAS, WEIGHT_DECAY, WARM_UP, BATCH = 2e-3, (0.9, 0.98), 0.1, 100, 8

Params = list[tuple[str, torch.nn.Parameter]]


def _ours(**formats: str) -> Callable[[Params, float], Any]:
    return lambda params, lr: DBAAdamW(params, lr=lr, **formats)  # type: ignore[arg-type]


ROWS: dict[str, tuple[torch.dtype, Callable[[Params, float], Any]]] = {
    "torch AdamW, fp32 weights": (
        torch.float32,
        lambda params, lr: torch.optim.AdamW([p for _, p in params], lr=lr, fused=True),
    ),
    "split16, int8 state": (torch.bfloat16, _ours(param_format="split16", state_format="int8")),
    "split8, int8 state": (torch.bfloat16, _ours(param_format="split8", state_format="int8")),
    "native (rounded to nearest), int8 state": (torch.bfloat16, _ours(param_format="native", state_format="int8")),
    "bitsandbytes AdamW8bit": (torch.bfloat16, PEERS["bitsandbytes"]),
    "torchao AdamW8bit, stochastic rounding": (torch.bfloat16, PEERS["torchao"]),
}
"""Dtype of the weights, and the optimizer on named parameters at a learning rate. The first row is the yardstick."""


def train(
    network: torch.nn.Module,
    dtype: torch.dtype,
    make: Callable[[Params, float], Any],
    loss_of: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    batches: list[Tensor],
) -> dict[str, Tensor]:
    """Weights (``dtype``) after one step per batch.

    Args:
        loss_of: the loss of a forward pass (tokens to logits) on a batch of tokens.
    """
    stored = {name: torch.nn.Parameter(p.detach().to(dtype, copy=True)) for name, p in network.named_parameters()}
    optimizer = make(list(stored.items()), LR)
    for group in optimizer.param_groups:
        group.update(betas=BETAS, weight_decay=WEIGHT_DECAY)
    for step, tokens in enumerate(batches):
        rate = LR * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            _set_rate(group, rate)
        loss_of(forward(network, stored), tokens).backward()
        optimizer.step()
        for param in stored.values():
            param.grad = None
    return {name: p.detach() for name, p in stored.items()}


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao keeps it in a tensor
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def forward(network: torch.nn.Module, stored: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Tokens to logits in fp32, whatever the weights are stored in."""
    wide = {name: p.float() for name, p in stored.items()}
    return lambda tokens: functional_call(network, wide, kwargs={"input_ids": tokens, "use_cache": False}).logits


def next_token_loss(predict: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean next-token loss (nats); negative tokens are padding and count nowhere."""
    logits = predict(tokens.clamp(min=0))[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)


def losses(steps: int, seed: int) -> dict[str, float]:
    """Held-out loss of every row, in nats per token; a peer that cannot be imported is left out."""
    from bench.quality import data, model

    torch.manual_seed(seed)
    start = model.new_model().eval()
    rows = data.windows("general", "base")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: steps * BATCH]
    batches = list(rows[order].split(BATCH))
    held_out = data.evaluation("general", "valid", 256)
    result = {}
    for name, (dtype, make) in ROWS.items():
        try:
            stored = train(start, dtype, make, next_token_loss, batches)
        except ImportError as error:
            click.echo(f"{name}: {error}", err=True)
            continue
        with torch.no_grad():
            result[name] = next_token_loss(forward(start, stored), held_out).item()
        click.echo(f"seed {seed}, {name}: {result[name]:.4f}", err=True)
    return result


@click.command()
@click.option("--steps", default=1000, show_default=True, help="Optimizer steps of 8 × 128 tokens.")
@click.option("--seeds", default=3, show_default=True, help="Initial weights and orders of the data.")
def main(steps: int, seeds: int) -> None:
    """Print the table."""
    runs = [losses(steps, seed) for seed in range(seeds)]
    yardstick = next(iter(ROWS))
    print(f"| {steps} steps, {seeds} seeds | held-out loss, nats per token |\n|---|---|")
    print(f"| {yardstick} | {statistics.mean(run[yardstick] for run in runs):.4f} |")
    for name in list(runs[0])[1:]:
        differences = [run[name] - run[yardstick] for run in runs]
        spread = f" ± {statistics.stdev(differences):.4f}" if seeds > 1 else ""
        print(f"| {name} | {statistics.mean(differences):+.4f}{spread} |")


if __name__ == "__main__":
    os.environ.setdefault("DBA_QUALITY_SIZE", "0.2M")  # read when bench.quality is imported
    main()

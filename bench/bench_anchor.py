"""Cost of the anchor: a step with and without one, a collection with and without curvature, and the bytes of it.

``python -m bench.bench_anchor`` prints them for the shapes of SmolLM2-135M; ``pytest bench`` a short one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import click
import pytest
import torch
from torch import nn

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.factors import Curvature, DiagonalFactor, KroneckerTerm, LowRankFactor
from dba_kernels.ops import encode

from .bench_step import Shapes, numel, smollm2_shapes
from .harness import compare

Named = list[tuple[str, nn.Parameter]]
TOKENS = 4 * 128
"""Of a training step."""


def factor(size: int, rank: int) -> LowRankFactor:
    rank = min(size, rank)
    return LowRankFactor(encode(torch.randn(size, rank) / size**0.5, "int8"), torch.rand(rank), 0.1)


def random_curvature(params: Named, rank: int) -> GlobalGradient:
    """As a collection would give it; the first matrix is a tied embedding."""
    found = {}
    for i, (name, param) in enumerate(params):
        shape = tuple(param.shape)
        if len(shape) == 1:
            found[name] = shape, Curvature(diagonal=torch.rand(shape))
            continue
        terms = [KroneckerTerm(factor(shape[0], rank), factor(shape[1], rank))]
        if i == 0:
            terms.append(KroneckerTerm(DiagonalFactor(torch.rand(shape[0])), factor(shape[1], rank)))
        found[name] = shape, Curvature(tuple(terms))
    return GlobalGradient.from_tensors((), curvatures=found)


def make_params(shapes: Shapes) -> Named:
    params = [(f"p{i}", nn.Parameter((torch.randn(shape) * 0.02).bfloat16())) for i, shape in enumerate(shapes)]
    for _, param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def stepper(params: Named, gg: GlobalGradient, anchor: float) -> DBAAdamW:
    """One whose every step is anchored."""
    options = {"anchor": anchor, "anchor_every": 1, "state_format": "int8", "param_format": "split16"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DBAAdamW(params, lr=1e-5, global_gradient=gg, **options)


def training_pass(shapes: Shapes) -> Callable[[], None]:
    """The products of a forward and a backward pass over the matrices: what a training step takes at least."""
    matrices = [
        (torch.randn(shape), torch.randn(TOKENS, shape[1])) for shape in dict.fromkeys(shapes) if len(shape) > 1
    ]
    counts = [sum(shape == tuple(weight.shape) for shape in shapes) for weight, _ in matrices]

    def run() -> None:
        for (weight, x), count in zip(matrices, counts, strict=True):
            for _ in range(count):
                y = x @ weight.T
                y @ weight  # gradient of x
                y.T @ x  # gradient of the weight

    return run


@click.command(help=__doc__)
@click.option("--rank", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(rank: int, rounds: int) -> None:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    shapes = smollm2_shapes()
    params = make_params(shapes)
    gg = random_curvature(params, rank)
    plain, anchored = stepper(params, gg, 0.0), stepper(params, gg, 30.0)
    step = compare(plain.step, anchored.step, rounds=rounds, warmup=1, clock=clock)
    run = training_pass(shapes)
    passes = compare(plain.step, run, rounds=rounds, warmup=1, clock=clock)
    extra = step.seconds - step.seconds / step.ratio
    click.echo(f"step, anchor against none: {step}")
    click.echo(f"products of {TOKENS} tokens, forward and backward: {passes.seconds * 1e3:.0f} ms")
    whole = passes.seconds + step.seconds / step.ratio
    for every in (1, 2, 4, 8):
        click.echo(f"anchor_every={every}: a training step is at most {1 + extra / every / whole:.2f} times as long")
    origins = sum(anchored.state[p]["anchor"].nbytes for _, p in params) / numel(shapes)
    factors = gg.curvature_nbytes / numel(shapes)
    click.echo(f"bytes per parameter: θ₀ {origins:.2f}, factors {factors:.2f}, together {origins + factors:.2f}")


@pytest.mark.parametrize("anchor", [0.0, 30.0])
def test_step(benchmark, anchor: float) -> None:
    """A step of 2 M parameters, without and with an anchor of rank 64."""
    shapes: Shapes = [(1536, 576)] * 2 + [(576,)]
    params = make_params(shapes)
    optimizer = stepper(params, random_curvature(params, 64), anchor)
    benchmark(optimizer.step)


if __name__ == "__main__":
    main()

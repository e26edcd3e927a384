"""What a fine-tuning run says of itself before it starts: its length, its boost, its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import torch

from dba_kernels import GlobalGradient
from dba_kernels.schedule import (
    ANCHORS,
    AUTO_ANCHOR,
    AUTO_BOOST_MAX,
    AUTO_BOOST_REACH,
    BOOSTS,
    initial_anchor,
    initial_boost,
)

from .finetune_options import Options
from .output import InputError
from .packing import Batches, Rows
from .sizes import Sizes
from .workload import Workload

SAMPLED = 200
"""Documents that the rows of the data are estimated from."""


def beginning(options: Options, work: Workload, gradient: GlobalGradient | None, batches: Batches) -> Iterator[str]:
    """A line each on the run's length, its learning rate, its boost and its memory."""
    rows, exact = rows_of(batches)
    tokens = options.steps * options.batch * options.length
    about = "" if exact else "about "
    yield (
        f"run      {options.steps:,} steps of {options.batch} rows of {options.length} tokens: {tokens:,} tokens, "
        f"{about}{options.steps * options.batch / rows:,.2f} epochs ({about}{rows:,.0f} rows in the data)"
    )
    warmup = f"after {options.warmup:,} steps of warm-up " if options.warmup else ""
    yield f"rate     η₀ = {options.lr:g}, falling {warmup}linearly to 0 at step {options.steps:,}"
    yield f"method   {method_in_words(options, gradient)}"
    yield f"memory   {memory_in_words(options, work, gradient)}"


def rows_of(batches: Batches) -> tuple[float, bool]:
    """Rows that the data fill once, and whether that is counted (else estimated from some documents)."""
    corpus, encoder, sampled = batches.corpus, batches.encoder, []
    for index in islice(corpus.order(batches.seed), SAMPLED):
        with suppress(InputError):  # the run will say which document it is
            sampled.append(encoder(corpus.document(index)))
    rows = sum(1 for _ in Rows(sampled, batches.length, encoder.padding))
    whole = len(sampled) == len(corpus)
    filled = rows if whole else max(rows - 0.5, 0.5)  # the last row of a sample goes on in the data
    return max(filled * len(corpus) / max(len(sampled), 1), 1.0), whole


def method_in_words(options: Options, gradient: GlobalGradient | None) -> str:
    """γ₀ and the rule that it comes from, or what there is in its place."""
    if gradient is None:
        return "AdamW: no global gradient"
    anchor = ""
    if gradient.curvature_records and options.anchor != "0":
        often = f", every {options.anchor_every} steps" if options.anchor_every > 1 else ""
        anchor = f"anchor λ = {_anchor(options, gradient)}{often}"
    if not len(gradient):
        return f"no boost: the file holds no gradient; {anchor or 'no anchor'}"
    if options.correction in ("agem", "pcgrad"):
        return f"{options.correction} against the stored gradient: no boost; {anchor}".rstrip("; ")
    boost, rule = options.boost, "--boost"
    if boost in BOOSTS:
        k0 = initial_boost(boost, options.steps, options.lr)
        rule = "paper: 200/T"
        if boost == "auto":
            k0 = 0.0 if anchor else k0
            rule = f"auto: min(200, {AUTO_BOOST_REACH:g}/η₀)/T, at most {AUTO_BOOST_MAX:g}" + (
                "; 0 with an anchor" if anchor else ""
            )
    else:
        k0 = float(boost)
    gamma = min(k0, options.boost_max)
    clamped = f", clamped to --boost-max {options.boost_max:g}" if gamma < k0 else ""
    words = f"γ₀ = {gamma:.3g}, falling linearly to 0 (k₀ = {k0:.3g}, {rule}{clamped})"
    return f"{words}; correction {options.correction}" + (f"; {anchor}" if anchor else "")


def _anchor(options: Options, gradient: GlobalGradient) -> str:
    if options.anchor not in ANCHORS:
        return f"{float(options.anchor):g}"
    strength = initial_anchor(options.lr, gradient.calibration)
    return f"{strength:.3g} (auto: {AUTO_ANCHOR:g}/η₀, at least the file's calibration)"


def memory_in_words(options: Options, work: Workload, gradient: GlobalGradient | None) -> str:
    """Bytes between steps, from the shapes: weights, gradients, optimizer state, global gradient and anchor."""
    shapes = {name: tuple(p.shape) for name, p in work.model.named_parameters() if p.requires_grad}
    sizes = Sizes(shapes, torch.bfloat16 if work.dtype == "bf16" else torch.float32)
    kept = "split16" if options.param_format == "auto" else options.param_format
    optimizer = sizes.state(options.state_format) + (sizes.remainder(kept) if work.dtype == "bf16" else 0)
    parts = {"weights": sizes.weights, "gradients": sizes.weights, "optimizer": optimizer}
    if gradient is not None:
        anchored = gradient.curvature_records and options.anchor != "0"
        parts["global gradient"] = gradient.nbytes - (0 if anchored else gradient.curvature_nbytes)
        base = sum(math.prod(shapes[name]) for name in gradient.curvature_records if name in shapes)
        parts |= {"base weights of the anchor": base * (2 if work.dtype == "bf16" else 4)} if anchored else {}
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
    saved = "; activations checkpointed" if options.gradient_checkpointing else "; activations come on top"
    return (
        f"{total / 2**20:,.1f} MiB between steps, {total / sizes.parameters:.2f} bytes per parameter ({listed}){saved}"
    )

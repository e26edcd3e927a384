"""κ: how much steeper the general loss is along Adam's steps than the curvature's ½⟨δ, Hδ⟩ says.

Kronecker factors per map are right along random directions. Adam's first step is the sign of the gradient: all layers
and positions move together, and just these cross terms are what the factors leave out. κ is measured on the general
data, at the base model, and is what λ of ``anchor="auto"`` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .backends import implementation
from .distributed import all_reduce_
from .factors import Curvature

KEPT = 8
"""Micro-batches that a calibration takes, the first ones: half of them as probes, half to read the loss off."""

RISES = (0.01, 0.1)
"""Nats: large enough to be read off a loss, small enough to be quadratic."""

TRIES = 12

Loss = Callable[[Any], "tuple[torch.Tensor, int | None]"]
"""Micro-batch → its mean loss and its number of target tokens."""


def keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """``batches`` as they are; the first :data:`KEPT` also go to ``kept``."""
    for batch in batches:
        if len(kept) < KEPT:
            kept.append(batch)
        yield batch


def calibrate(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    curvatures: Callable[[str], Curvature | None],
    batches: list[Any],
    loss_of: Loss,
) -> float | None:
    """κ = [L(θ₀+δ) + L(θ₀−δ) − 2 L(θ₀)] / ⟨δ, Hδ⟩ at δ = ε·sign(g), the geometric mean over the probes' gradients g.

    The weights move meanwhile, and are put back bit for bit. Memory: the gradients, the weights and a byte per element.

    Args:
        model: in the state of the collection.
        params: its trainable parameters, by the names of the curvature.
        curvatures: H of each.
        batches: as :func:`keeping` kept them.
        loss_of: see :data:`Loss`.

    Returns:
        κ; None where no step raises the loss by an amount that can be read off.
    """
    half = max(1, len(batches) // 2)
    probes, rows = batches[:half], batches[half:] or batches
    modes = [(module, module.training) for module in model.modules()]
    origin = {name: param.detach().clone() for name, param in params.items()}
    model.eval()
    try:
        with torch.no_grad():
            start = _mean_loss(rows, loss_of)
        logs = []
        for probe in probes:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss_of(probe)[0], list(params.values()), allow_unused=True)
            pairs = zip(params, grads, strict=True)
            signs = {name: grad.sign().to(torch.int8) for name, grad in pairs if grad is not None}
            del grads
            with torch.no_grad():
                found = _along(signs, params, origin, curvatures, lambda: _mean_loss(rows, loss_of) - start)
            logs += [] if found is None else [math.log(found)]
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(origin[name])
        for module, training in modes:
            module.training = training
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def mean_over_ranks(own: float | None, device: torch.device, group: dist.ProcessGroup | None) -> float | None:
    """The geometric mean of what the ranks found; None where none found anything."""
    found = [0.0, 0.0] if own is None else [math.log(own), 1.0]
    sums = all_reduce_(torch.tensor(found, dtype=torch.float64, device=device), group) if group is not None else None
    total, count = found if sums is None else sums.tolist()
    return math.exp(total / count) if count else None


def _mean_loss(batches: list[Any], loss_of: Loss) -> float:
    losses = [(float(loss), 1 if tokens is None else int(tokens)) for loss, tokens in map(loss_of, batches)]
    return math.fsum(loss * tokens for loss, tokens in losses) / max(1, sum(tokens for _, tokens in losses))


def _along(
    signs: Mapping[str, torch.Tensor],
    params: Mapping[str, torch.Tensor],
    origin: Mapping[str, torch.Tensor],
    curvatures: Callable[[str], Curvature | None],
    rise_of: Callable[[], float],
) -> float | None:
    """True over predicted rise along ±ε·signs; None where no ε gives a rise within :data:`RISES`."""
    definition, predicted = implementation("reference", "anchor"), 0.0
    for name, sign in signs.items():
        if (curvature := curvatures(name)) is not None:
            wide = sign.float()
            predicted += 0.5 * float((wide * definition.hessian_product(curvature, wide)).double().sum())
    if predicted <= 0.0:
        return None

    def rise_at(step: float) -> float:
        for name, sign in signs.items():
            params[name].copy_(origin[name] + step * sign)
        return rise_of()

    step = math.sqrt(RISES[0] / predicted)
    for _ in range(TRIES):
        rise = (rise_at(step) + rise_at(-step)) / 2
        if RISES[0] <= rise <= RISES[1]:
            return rise / (step**2 * predicted)
        step *= 0.5 if not rise <= RISES[1] else 2.0
    return None

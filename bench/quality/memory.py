"""The second-order memory of the study: Kronecker factors of the general loss' curvature, exact, then truncated.

``H Δ = B Δ A`` per linear map (eq. 11; K-FAC, Martens & Grosse 2015; as an anchor against forgetting: Ritter et al.
2018), A = E[x xᵀ] over token positions, B = E[d dᵀ] of per-token gradients of the outputs. The token embedding has a
diagonal A (token frequencies); a tied weight is the embedding and the output layer at once and takes both terms, the
output layer with a diagonal B (its rows are tokens too). Norms have the diagonal Fisher. Plain torch, apart from the
library's own: ``tests/test_quality_memory.py`` compares both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


@dataclass
class Curvature:
    """Means over a zero-learning-rate pass, exact: per parameter its terms ``{"rows": B, "columns": A}``.

    A factor is ``[n, n]``, or ``[n]`` where it is diagonal; norms have one term ``{"diagonal": F}``. An embedding's
    rows are its inputs: there A stands under ``rows``.
    """

    terms: dict[str, list[Named]]
    mean: Named  # ĝ_G (eq. 1)
    diagonal: Named  # N·E[g²] per element, over batches of N predicted tokens: EWC
    tokens: int  # predicted tokens that the means are over
    seconds: float = 0.0


class _Collector:
    """Hooks on every linear map and embedding: inputs on the way forward, output gradients on the way back."""

    def __init__(self, network: nn.Module) -> None:
        self.names = {id(p): n for n, p in network.named_parameters()}
        self.sums: dict[tuple[str, str], Named] = {}
        self.inputs: dict[nn.Module, Tensor] = {}
        self.weight = 0.0  # of the current batch
        self.handles = []
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                self.handles.append(module.register_forward_hook(self._forward))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()[:, :-1].flatten(0, 1)  # the last position predicts nothing
        output.register_hook(lambda d: self._backward(module, x, d[:, :-1].flatten(0, 1)))

    def _backward(self, module: nn.Module, x: Tensor, d: Tensor) -> None:
        """``d`` is of the mean loss over N positions: N·Σ d dᵀ is the mean over positions of the per-token square."""
        count = len(d)
        name = self.names[id(module.weight)]
        if isinstance(module, nn.Embedding):
            a = torch.bincount(x, minlength=module.num_embeddings).float() / count
            new = {"rows": a, "columns": d.T @ d * count}
            role = "embedding"
        else:
            head = module.out_features > 4 * module.in_features  # rows are tokens
            b = d.square().sum(0) * count if head else d.T @ d * count
            new = {"rows": b, "columns": x.T @ x / count}
            role = "linear"
        sums = self.sums.setdefault((name, role), {})
        for key, value in new.items():
            sums[key] = sums[key].add_(value) if key in sums else value


def collect(network: nn.Module, batches: Iterable[Tensor], sampled: bool = False) -> Curvature:
    """Curvature at the weights of ``network`` from batches of windows ``[rows, length]``.

    ``sampled``: labels are drawn from the model (the true Fisher matrix) instead of the data's own (the empirical one).
    """
    from bench.quality import model

    began = time.monotonic()
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    collector = _Collector(network)
    generator = torch.Generator().manual_seed(99)
    seen = count = 0
    for rows in batches:
        logits = model.logits(network, rows)[:, :-1].flatten(0, 1)
        targets = rows[:, 1:].flatten()
        if sampled:
            targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        nn.functional.cross_entropy(logits, targets).backward()
        count += 1
        seen += targets.numel()
        for name, parameter in parameters.items():
            total[name] += parameter.grad
            squares[name].addcmul_(parameter.grad, parameter.grad, value=float(targets.numel()))
            parameter.grad = None
    collector.remove()
    terms: dict[str, list[Named]] = {n: [] for n in parameters}
    for (name, _), sums in collector.sums.items():
        terms[name].append({k: v / count for k, v in sums.items()})
    for name, found in terms.items():
        if not found:
            found.append({"diagonal": squares[name] / count})
    diagonal = {n: s / count for n, s in squares.items()}
    mean = {n: t / count for n, t in total.items()}
    return Curvature(terms, mean, diagonal, seen, time.monotonic() - began)


RISES = (0.01, 0.1)  # nats: large enough to be read off a loss, small enough to be quadratic


def calibration(network: nn.Module, terms: dict[str, list[Any]], probes: list[Tensor], rows: Tensor) -> float:
    """κ: how much steeper the general loss is along Adam's steps than ½⟨δ, Hδ⟩ says.

    Adam's first step is the sign of the gradient: every layer and position moves together, and Kronecker factors per
    map leave just these cross terms out (along a random direction they are right). κ is the symmetric second
    difference of the loss of ``rows`` over ⟨δ, Hδ⟩ at δ = ε·sign(g), g the gradient of each of ``probes`` in turn; the
    geometric mean over the probes.
    """
    from bench.quality import model

    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    origin = {n: p.detach().clone() for n, p in parameters.items()}
    start, logs = model.mean_loss(network, rows), []

    @torch.no_grad()
    def loss_at(signs: Named, step: float) -> float:
        for name, parameter in parameters.items():
            parameter.copy_(origin[name] + step * signs[name])
        return model.mean_loss(network, rows)

    for probe in probes:
        model.loss_fn(network, probe).backward()
        signs = {n: p.grad.sign() for n, p in parameters.items()}
        network.zero_grad(set_to_none=True)
        predicted = 0.5 * sum((s * product(terms[n], s)).sum().item() for n, s in signs.items())
        step = (RISES[0] / predicted) ** 0.5
        for _ in range(20):
            rise = (loss_at(signs, step) + loss_at(signs, -step)) / 2 - start
            if RISES[0] <= rise <= RISES[1]:
                break
            step *= 0.5 if rise > RISES[1] else 2.0
        loss_at(signs, 0.0)
        logs.append(math.log(max(rise, 1e-30) / (step**2 * predicted)))
    return math.exp(sum(logs) / len(logs))


@dataclass
class Factor:
    """A symmetric factor: ``basis diag(excess) basisᵀ + rest·I``, or ``diag(rest)`` with a vector rest."""

    rest: Tensor  # scalar or [n]
    basis: Tensor | None = None  # [n, r]
    excess: Tensor | None = None  # [r]: eigenvalues minus the rest

    @classmethod
    def truncated(cls, matrix: Tensor, rank: int, isotropic: bool = True) -> Factor:
        """The ``rank`` leading eigenpairs plus an isotropic rest that keeps the trace (eq. 12)."""
        if matrix.ndim == 1:
            return cls(matrix)
        values, vectors = torch.linalg.eigh(matrix.double())
        n = len(values)
        rank = min(rank, n)
        rest = values[: n - rank].mean().clamp(min=0) if isotropic and rank < n else torch.zeros((), dtype=values.dtype)
        return cls(rest.float(), vectors[:, n - rank :].float(), (values[n - rank :] - rest).float())

    def right(self, x: Tensor) -> Tensor:
        """``x @ factor``."""
        result = x * self.rest
        if self.basis is not None:
            result = result.addmm_((x @ self.basis) * self.excess, self.basis.T)
        return result

    def left(self, x: Tensor) -> Tensor:
        """``factor @ x``."""
        result = x * (self.rest.unsqueeze(-1) if self.rest.ndim else self.rest)
        if self.basis is not None:
            result = result.addmm_(self.basis, self.excess.unsqueeze(-1) * (self.basis.T @ x))
        return result


def truncated(curvature: Curvature, rank: int, isotropic: bool = True) -> dict[str, list[Any]]:
    """Per parameter the terms as pairs of factors, of the rows and of the columns, or a diagonal tensor."""
    result: dict[str, list[Any]] = {}
    for name, terms in curvature.terms.items():
        result[name] = [
            t["diagonal"]
            if "diagonal" in t
            else (Factor.truncated(t["rows"], rank, isotropic), Factor.truncated(t["columns"], rank, isotropic))
            for t in terms
        ]
    return result


def product(terms: list[Any], delta: Tensor) -> Tensor:
    """H Δ (eq. 11)."""
    total = torch.zeros_like(delta)
    for term in terms:
        total += term * delta if isinstance(term, Tensor) else term[0].left(term[1].right(delta))
    return total


def damped(terms: list[Any], delta: Tensor, strength: float) -> Tensor:
    """``(I + strength·H)⁻¹ Δ``, one term after the other: the implicit step of the anchor."""
    for term in terms:
        delta = delta / (1 + strength * term) if isinstance(term, Tensor) else _damped(*term, delta, strength)
    return delta


def _damped(left: Factor, right: Factor, delta: Tensor, strength: float) -> Tensor:
    rest_left = left.rest.unsqueeze(-1) if left.rest.ndim else left.rest

    def shrink(b: Tensor, a: Tensor) -> Tensor:
        return 1 / (1 + strength * b * a)

    rest = shrink(rest_left, right.rest)
    result = delta * rest
    if right.basis is not None:
        p = delta @ right.basis  # [rows, r]
        result += p * (shrink(rest_left, right.excess + right.rest) - rest) @ right.basis.T
    if left.basis is not None:
        q = left.basis.T @ delta  # [r, cols]
        full_left = (left.excess + left.rest).unsqueeze(-1)
        correction = q * (shrink(full_left, right.rest) - rest)
        if right.basis is not None:
            core = q @ right.basis
            a = right.excess + right.rest
            mixed = shrink(full_left, a) - shrink(full_left, right.rest) - shrink(rest_left, a) + rest
            correction = correction + (core * mixed) @ right.basis.T
        result += left.basis @ correction
    return result


class Anchor:
    """λ·H·(θ − θ₀) of one run (eq. 10), every ``every`` steps so many times as strong; θ₀ is where the run starts."""

    def __init__(self, terms: dict[str, list[Any]], parameters: Named, weight: float, every: int) -> None:
        self.terms, self.weight, self.every = terms, weight, every
        self.origin = {n: p.detach().clone() for n, p in parameters.items()}

    def gradient(self, name: str, parameter: Tensor, step: int) -> Tensor:
        """The addend of the gradient of ``name`` at ``step``."""
        if (step + 1) % self.every:
            return parameter.new_zeros(())
        return product(self.terms[name], parameter - self.origin[name]).mul_(self.weight * self.every)

    def pull(self, name: str, parameter: Tensor, strength: float) -> None:
        """The implicit step: the parameter moves to where ``strength``·H·(θ − θ₀) balances the move."""
        delta = damped(self.terms[name], parameter - self.origin[name], strength)
        parameter.copy_(self.origin[name] + delta)

    def predicted_rise(self, parameters: Named) -> float:
        """½ ⟨δ, H δ⟩ in nats per token."""
        deltas = {n: p - self.origin[n] for n, p in parameters.items()}
        return 0.5 * sum((d * product(self.terms[n], d)).sum().item() for n, d in deltas.items())

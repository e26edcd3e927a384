"""The anchor's part of a step: λ H (θ − θ₀) is added to the gradient before the moments (eqs. 10–12).

Per tensor, with H Δ = B Δ A, A = U diag(t) Uᵀ + a I on the columns and B = V diag(s) Vᵀ + b I on the rows::

    Q = Vᵀ Δ,   P = Δ U,   H Δ = V · s (Q U t Uᵀ + a Q)  +  (b P t) · Uᵀ  +  a b Δ

one low-rank addend: two products of rank r and one of rank 2r with the tensor's elements. Rows go block by block, of
:data:`BLOCK` elements, through a scratch that holds a·g_D + λ H Δ in fp32 and that the step takes for its gradient. So
the step itself is the one that runs without an anchor, on every backend, and memory beyond θ₀ and the factors does not
grow with the model. A global gradient that is stored low rank is added to the same scratch, by a product of its own.

Bytes per parameter with 16-bit θ₀, weights and remainders: 6 read for δ, 2 for g_D, 4 written and read again as the
gradient, in place of the 2 of g_D alone; of tensors above a block those for δ once more. Products: 8 r operations.
With ``anchor_every=k`` all this happens in every k-th step, with k λ in place of λ; the others are plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import ops
from .distributed import Sharding
from .factors import Curvature, DiagonalFactor, KroneckerTerm, LowRankFactor
from .formats import matrix_shape
from .stepdata import BY_PLAN, CHECKED, UPDATED_PARTS, Coefficient, Factors, ParamTensors, TensorBatch
from .threads import map_on_threads

BLOCK = 2**20
"""Elements of a block: 4 MiB of fp32, which a CPU's last cache holds, and few enough calls."""


@dataclass
class AnchoredTensor:
    """One parameter, or this rank's rows of it, with its anchor.

    Args:
        tensors: what a step reads and writes.
        formats: of the parameter, its state and its global gradient.
        origin: θ₀, in the parameter's dtype and shape.
        curvature: H of these rows, on the parameter's device.
        cut: whether other ranks hold other rows.
    """

    tensors: ParamTensors
    formats: tuple[str, str, str]
    origin: torch.Tensor
    curvature: Curvature
    cut: bool = False
    blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows, cols = matrix_shape(tuple(self.tensors.param.shape))
        step = rows if self.tensors.param.dim() == 0 else max(1, BLOCK // max(cols, 1))
        self.blocks = [Block.of(self, start, min(start + step, rows)) for start in range(0, rows, step)]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.tensors.param.dtype == torch.float64 else torch.float32


@dataclass
class Block:
    """Rows ``start:stop`` of a parameter: views of everything that a step of them takes."""

    start: int
    stop: int
    batch: TensorBatch
    origin: torch.Tensor
    curvature: Curvature
    low_rank: Factors | None

    @classmethod
    def of(cls, whole: AnchoredTensor, start: int, stop: int) -> Block:
        tensors, (param_format, state_format, global_format) = whole.tensors, whole.formats
        stored, low_rank = tensors.global_grad, None
        if isinstance(stored, Factors):
            low_rank, stored, global_format = replace(stored, left=stored.left[start:stop]), None, "none"
        views: dict[str, Any] = {}
        if tensors.param.dim() > 0:
            views = {part: t[start:stop] for part in UPDATED_PARTS if (t := getattr(tensors, part)) is not None}
            stored = None if stored is None else stored.row_slice(start, stop)
        offset = tensors.offset + start * matrix_shape(tuple(tensors.param.shape))[1]
        part = replace(tensors, **views, global_grad=stored, offset=offset)
        origin = whole.origin[start:stop] if whole.origin.dim() > 0 else whole.origin
        batch = TensorBatch(param_format, state_format, global_format, [part], {CHECKED: BY_PLAN})
        return cls(start, stop, batch, origin, whole.curvature.rows(start, stop), low_rank)

    def displacement(self, backend: str) -> torch.Tensor:
        """δ = θ − θ₀ of the exact parameter, as a matrix (a vector of a vector)."""
        part = self.batch.tensors[0]
        delta = ops.displacement(part.param, part.remainder, self.origin, self.batch.param_format, backend)
        return delta.flatten(1) if delta.dim() > 1 else delta


class DecodedTerm:
    """A Kronecker term with its factors decoded for one step."""

    def __init__(self, term: KroneckerTerm, dtype: torch.dtype, backend: str) -> None:
        self.u = ops.decode(term.right.u, backend).to(dtype)  # [cols, r]
        self.t, self.a = term.right.sigma.to(dtype), term.right.rest
        self.left = term.left
        if isinstance(term.left, LowRankFactor):
            self.v = ops.decode(term.left.u, backend).to(dtype)  # [rows, r]
            self.s, self.b = term.left.sigma.to(dtype), term.left.rest
            self.q = self.v.new_zeros(self.v.shape[1], self.u.shape[0])  # [r, cols]

    def project(self, delta: torch.Tensor, start: int, stop: int) -> None:
        """Q += Vᵀ Δ of these rows."""
        if isinstance(self.left, LowRankFactor):
            self.q.addmm_(self.v[start:stop].T, delta)

    def mixed(self) -> torch.Tensor:
        """s (Q U t Uᵀ + a Q), ``[r, cols]``: what V is multiplied with."""
        return self.s.unsqueeze(1) * (((self.q @ self.u) * self.t) @ self.u.T + self.a * self.q)

    def addend(
        self, delta: torch.Tensor, start: int, stop: int, mixed: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | float]:
        """H Δ of these rows: left and right factors of its low-rank part, and what multiplies Δ itself."""
        p = (delta @ self.u) * self.t
        if isinstance(self.left, DiagonalFactor):
            weights = self.left.diagonal[start:stop].to(delta.dtype).unsqueeze(1)
            return [weights * p], [self.u.T], weights * self.a
        assert mixed is not None
        return [self.v[start:stop], p * self.b], [mixed, self.u.T], self.a * self.b


class AnchorStep:
    """The step of all anchored parameters of one device, laid out once.

    Args:
        anchored: the parameters.
        sharding: how rows lie on the ranks.
    """

    def __init__(self, anchored: Iterable[AnchoredTensor], sharding: Sharding) -> None:
        self.anchored = list(anchored)
        self.sharding = sharding
        self._figures: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: TensorBatch,
        origins: list[torch.Tensor],
        curvatures: list[Curvature | None],
        sharding: Sharding,
    ) -> AnchorStep:
        """The step of a batch, of whose parameters each has a θ₀ and a curvature."""
        formats = batch.param_format, batch.state_format, batch.global_format
        anchored = []
        for tensors, origin, curvature in zip(batch.tensors, origins, curvatures, strict=True):
            assert curvature is not None
            cut = bool(sharding.rows) and sharding.rows[tensors.index] is not None
            anchored.append(AnchoredTensor(tensors, formats, origin, curvature, cut))
        return cls(anchored, sharding)

    def run(self, grads: list[torch.Tensor], coefficients: torch.Tensor, anchor: float, backend: str = "auto") -> None:
        """Step every anchored parameter.

        Args:
            grads: one per parameter, fp32, bf16 or fp16 (fp64 of fp64 parameters), contiguous.
            coefficients: float64 ``[n_params, Coefficient.COUNT]``.
            anchor: λ, above 0.
        """
        unit = coefficients.clone()
        unit[:, Coefficient.GRAD_WEIGHT] = 1.0  # the gradients that are handed on are weighted already
        ahead = self._project_all(backend)

        def run_one(at: int) -> torch.Tensor:
            whole, grad, sums = self.anchored[at], grads[at], self._new_figures()
            weights = coefficients[whole.tensors.index].to(whole.dtype)
            for block, delta, pull in self._pulls(whole, ahead.get(id(whole)), anchor, backend):
                if self.sharding.communicates:
                    self._count(sums, whole, delta, pull)
                part = grad[block.start : block.stop] if grad.dim() > 0 else grad
                boosted = self._boosted(block, part, pull.view_as(part), weights)
                ops.step(block.batch, [boosted], unit, backend)
            return sums

        counted = map_on_threads(run_one, range(len(grads)), grads[0].device)
        if self.sharding.communicates:
            self._figures = self.sharding.sum_(torch.stack(counted).sum(0))

    @torch.no_grad()
    def figures(self, anchor: float, backend: str = "auto") -> tuple[float, float]:
        """‖λ H δ‖² and ½ ⟨δ, H δ⟩ at the weights as they are; of a sharded model, where the last step began, because
        one rank may ask alone."""
        sums = self._figures
        if sums is None:
            device = self.anchored[0].tensors.param.device
            found = map_on_threads(lambda whole: self._counted(whole, anchor, backend), self.anchored, device)
            sums = torch.stack(found).sum(0)
        square, energy = sums.tolist()
        return square, energy / (2 * anchor)

    def _new_figures(self) -> torch.Tensor:
        return torch.zeros(2, dtype=torch.float64, device=self.anchored[0].tensors.param.device)

    def _counted(self, whole: AnchoredTensor, anchor: float, backend: str) -> torch.Tensor:
        sums = self._new_figures()
        for _, delta, pull in self._pulls(whole, None, anchor, backend):
            self._count(sums, whole, delta, pull)
        return sums

    def _count(self, sums: torch.Tensor, whole: AnchoredTensor, delta: torch.Tensor, pull: torch.Tensor) -> None:
        """Add ‖λ H δ‖² and ⟨δ, λ H δ⟩ of a block; what all ranks hold whole, one of them brings in."""
        if whole.cut or self.sharding.leads:
            flat = pull.reshape(-1)
            sums += torch.stack((torch.dot(flat, flat), torch.dot(flat, delta.reshape(-1))))

    def _project_all(self, backend: str) -> dict[int, list[DecodedTerm]]:
        """Of parameters cut by rows, Q over all ranks' rows: one all-reduce for all of them."""
        if not self.sharding.communicates:
            return {}
        decoded: dict[int, list[DecodedTerm]] = {}
        for whole in self.anchored:
            if whole.cut:
                terms = decoded[id(whole)] = _decode(whole, backend)
                for block in whole.blocks:
                    _project(terms, block, block.displacement(backend))
        sums = [term.q for terms in decoded.values() for term in terms if isinstance(term.left, LowRankFactor)]
        if sums:
            flat = self.sharding.sum_(torch.cat([q.reshape(-1) for q in sums]))
            for q, total in zip(sums, flat.split([q.numel() for q in sums]), strict=True):
                q.copy_(total.view_as(q))
        return decoded

    def _pulls(
        self, whole: AnchoredTensor, terms: list[DecodedTerm] | None, anchor: float, backend: str
    ) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
        """Every block of a parameter with δ and λ H δ; ``terms`` where Q is known already."""
        kept: torch.Tensor | None = None  # δ of a tensor of one block serves both passes
        if terms is None:
            terms = _decode(whole, backend)
            if terms:
                for block in whole.blocks:
                    kept = block.displacement(backend)
                    _project(terms, block, kept)
        mixed = [term.mixed() if isinstance(term.left, LowRankFactor) else None for term in terms]
        for block in whole.blocks:
            delta = kept if kept is not None and len(whole.blocks) == 1 else block.displacement(backend)
            yield block, delta, _pull(block, delta, terms, mixed, anchor)

    @staticmethod
    def _boosted(block: Block, grad: torch.Tensor, pull: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """a·g_D + λ H δ, and b·ĝ_G where that is stored low rank; written over ``pull``."""
        pull.addcmul_(grad.to(pull.dtype), weights[Coefficient.GRAD_WEIGHT])
        if block.low_rank is not None:
            left = block.low_rank.left.to(pull.dtype) * weights[Coefficient.GLOBAL_WEIGHT]
            pull.flatten(1).addmm_(left, block.low_rank.right.to(pull.dtype))
        return pull


def _decode(whole: AnchoredTensor, backend: str) -> list[DecodedTerm]:
    return [DecodedTerm(term, whole.dtype, backend) for term in whole.curvature.terms]


def _project(terms: list[DecodedTerm], block: Block, delta: torch.Tensor) -> None:
    for term in terms:
        term.project(delta, block.start, block.stop)


def _pull(
    block: Block, delta: torch.Tensor, terms: list[DecodedTerm], mixed: list[torch.Tensor | None], anchor: float
) -> torch.Tensor:
    """λ H Δ of a block."""
    diagonal = block.curvature.diagonal
    if diagonal is not None:
        return delta * (diagonal.to(delta.dtype) * anchor)
    lefts: list[torch.Tensor] = []
    rights: list[torch.Tensor] = []
    own: torch.Tensor | float = 0.0
    for term, its_mixed in zip(terms, mixed, strict=True):
        left, right, weight = term.addend(delta, block.start, block.stop, its_mixed)
        lefts += left
        rights += right
        own = own + weight
    scaled, beta = (delta, own * anchor) if isinstance(own, float) else (own * delta, anchor)
    # [rows, R] · [R, cols]
    return torch.addmm(scaled, torch.cat(lefts, dim=1), torch.cat(rights), beta=beta, alpha=anchor)

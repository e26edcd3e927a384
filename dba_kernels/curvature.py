"""The running sums behind the curvature, fed by hooks on a model's linear maps during the zero-learning-rate pass."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from .distributed import Sharding, all_reduce_, local, world_size
from .factors import Curvature, DiagonalFactor, KroneckerTerm, LowRankFactor
from .formats import matrix_shape
from .ops import encode
from .sketch import OVERSAMPLING, eigenpairs, project, with_rest

LINEAR, TRANSPOSED, EMBEDDING = "linear", "transposed", "embedding"
"""Kinds of maps: weight [out, in]; [in, out], transformers' Conv1D; [tokens, out]."""


def kind_of(module: nn.Module) -> str | None:
    """The kind of linear map that a module is; None for any other, also for a subclass with a forward of its own.

    Of embeddings transformers' scaled ones are known: their forward multiplies by ``embed_scale``.
    """
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        return EMBEDDING if forward is nn.Embedding.forward or hasattr(module, "embed_scale") else None
    if isinstance(module, nn.Linear):
        return LINEAR if forward is nn.Linear.forward else None
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    return TRANSPOSED if is_conv1d else None


def maps_of(model: nn.Module, params: Mapping[str, torch.Tensor]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Per parameter, the linear maps that use it as their weight: two for a tied embedding, none for a norm."""
    names = {id(param): name for name, param in params.items()}
    found: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        kind, weight = kind_of(module), getattr(module, "weight", None)
        if kind is not None and id(weight) in names:
            found[names[id(weight)]].append((module, kind))
    return dict(found)


@dataclass
class MapSums:
    """Sums of one linear map, all of them linear in the data.

    Args:
        kind: one of the above.
        inputs: sketch of Σ x xᵀ, ``[in, l]``; of an embedding the tokens' counts, ``[tokens]``.
        outputs: sketch of Σ N² d dᵀ, ``[out, l]``, d of the mean loss over N targets.
        scalars: float64 ``[5]``: positions, Σ‖x‖², Σ N²‖d‖², targets ΣN, uses dropped for not being finite.
    """

    kind: str
    inputs: torch.Tensor
    outputs: torch.Tensor
    scalars: torch.Tensor

    @classmethod
    def zeros(cls, kind: str, weight: torch.Tensor, columns: int) -> MapSums:
        rows, cols = matrix_shape(tuple(weight.shape))
        size_in, size_out = (cols, rows) if kind == LINEAR else (rows, cols)
        device, dtype = local(weight).device, torch.promote_types(weight.dtype, torch.float32)
        shape_in = (size_in,) if kind == EMBEDDING else (size_in, min(columns, size_in))
        return cls(
            kind,
            torch.zeros(shape_in, dtype=dtype, device=device),
            torch.zeros(size_out, min(columns, size_out), dtype=dtype, device=device),
            torch.zeros(5, dtype=torch.float64, device=device),
        )

    def add(self, inputs: torch.Tensor, output_grad: torch.Tensor, scale: float, targets: float) -> None:
        """Add one use of the map in a micro-batch; one that is not finite adds nothing.

        A position counts where its output gradient is not zero: padding does not, nor does a token that no target
        depends on.

        Args:
            inputs: x ``[…, in]``, or an embedding's token numbers ``[…]``.
            output_grad: ``[…, out]``.
            scale: makes it the gradient of the sum of the loss over the targets: N for one of the mean.
            targets: N.
        """
        d = output_grad.reshape(-1, output_grad.shape[-1])
        counts = (d != 0).any(dim=1, keepdim=True)
        positions = counts.sum()
        d = d.to(self.outputs.dtype)
        if self.kind == EMBEDDING:
            added_in = torch.zeros_like(self.inputs).index_add_(0, inputs.reshape(-1), counts.squeeze(1).to(d.dtype))
            square_in = positions
        else:
            x = inputs.reshape(-1, inputs.shape[-1]).to(d.dtype)
            added_in = x.T @ (project(x, self.inputs.shape[1]) * counts)
            square_in = (x.square().sum(dim=1, keepdim=True) * counts).sum()
        added_out = (d.T @ project(d, self.outputs.shape[1])) * scale**2
        square_out = d.square().sum() * scale**2
        finite = torch.isfinite(square_in + square_out)
        added = [positions, square_in, square_out, torch.full_like(self.scalars[0], targets)]
        self.inputs += added_in.where(finite, 0.0)
        self.outputs += added_out.where(finite, 0.0)
        self.scalars[:4] += torch.stack([value.to(self.scalars) for value in added]).where(finite, 0.0)
        self.scalars[4] += ~finite

    def term(self, rank: int, format: str) -> KroneckerTerm | None:
        """B and A of eq. 11, each of rank r and an isotropic rest  (eq. 12); None where the data never came by."""
        positions, square_in, square_out, targets, _ = self.scalars.tolist()
        if positions == 0:
            return None
        outputs = _low_rank(self.outputs, targets, square_out, rank, format)
        if self.kind == EMBEDDING:
            return KroneckerTerm(DiagonalFactor(self.inputs.float() / positions), outputs)
        inputs = _low_rank(self.inputs, positions, square_in, rank, format)
        return KroneckerTerm(outputs, inputs) if self.kind == LINEAR else KroneckerTerm(inputs, outputs)


def _low_rank(sketch: torch.Tensor, count: float, trace: float, rank: int, format: str) -> LowRankFactor:
    kept = min(rank, sketch.shape[1])
    u, values = eigenpairs(sketch / count, kept, trace / count)
    sigma, rest = with_rest(values, len(sketch), trace / count)
    return LowRankFactor(encode(u.float(), format), sigma.float(), rest)


@dataclass
class DiagonalSums:
    """Σ N² g² of a parameter that is no linear map's weight: of its elements if it is a vector, else added up.

    The square of a micro-batch's gradient stands for the sum of its tokens' squares, which it is in expectation where
    their mean is small.
    """

    squares: torch.Tensor
    scalars: torch.Tensor  # float64 [2]: targets ΣN, micro-batches dropped for not being finite

    @classmethod
    def zeros(cls, param: torch.Tensor) -> DiagonalSums:
        part = local(param)
        dtype = torch.promote_types(param.dtype, torch.float32)
        squares = torch.zeros(part.shape if param.dim() == 1 else (), dtype=dtype, device=part.device)
        return cls(squares, torch.zeros(2, dtype=torch.float64, device=part.device))

    def add(self, grad: torch.Tensor, targets: float) -> None:
        """Add a micro-batch's gradient of the mean loss over ``targets``."""
        squares = (grad.to(self.squares.dtype) * targets).square()
        total = squares.sum()
        finite = torch.isfinite(total)
        self.squares += (squares if self.squares.dim() else total).where(finite, 0.0)
        self.scalars[0] += targets * finite
        self.scalars[1] += ~finite


class CurvatureSums:
    """The sums of every trainable parameter, and the hooks that feed them.

    Memory: ``(in + out) · (r + p)`` numbers of 4 bytes per linear map, and the map's inputs are kept until its backward
    pass, which autograd does too.

    Args:
        model: its linear maps are found here.
        params: trainable parameters by name.
        rank: r of the factors.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, torch.Tensor], rank: int) -> None:
        if rank < 1:
            raise ValueError(f"curvature: expected a rank of at least 1, got {rank}")
        self.rank = rank
        self.params = dict(params)
        self.maps: dict[str, list[MapSums]] = {}
        self._modules: list[tuple[nn.Module, MapSums]] = []
        for name, users in maps_of(model, params).items():
            self.maps[name] = [MapSums.zeros(kind, params[name], rank + OVERSAMPLING) for _, kind in users]
            self._modules += [(module, sums) for (module, _), sums in zip(users, self.maps[name], strict=True)]
        self.diagonals = {name: DiagonalSums.zeros(param) for name, param in params.items() if name not in self.maps}
        self._scale: float = 0.0
        self._targets: float | None = None  # of the micro-batch in its backward pass

    # --- the pass -----------------------------------------------------------------------------------------------------

    def attach(self) -> list[RemovableHandle]:
        """Watch every map's inputs and output gradients, until the handles are removed."""
        handles = []
        for module, sums in self._modules:
            factor = float(getattr(module, "embed_scale", 1.0)) if sums.kind == EMBEDDING else 1.0
            hook = functools.partial(self._watch, sums, factor)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def begin(self, targets: float, scale: float | None = None) -> None:
        """A backward pass begins, of the mean loss over ``targets``, or of 1 / ``scale`` times the sum over them."""
        self._targets, self._scale = float(targets), float(targets if scale is None else scale)

    def end(self) -> None:
        self._targets = None

    def _watch(
        self,
        sums: MapSums,
        factor: float,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        if not output.requires_grad:
            return  # no backward pass will come by, or it recomputes this one
        inputs = (args[0] if args else kwargs["input"]).detach()

        def hook(grad: torch.Tensor) -> None:
            if self._targets is not None:
                sums.add(inputs, grad, self._scale * factor, self._targets)

        output.register_hook(hook)

    def add_grad(self, name: str, grad: torch.Tensor) -> None:
        """The gradient of one parameter is complete; it matters where no linear map has the parameter."""
        if name in self.diagonals and self._targets is not None:
            self.diagonals[name].add(grad, self._targets)

    # --- together -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is summed, for snapshots and for sums over ranks."""
        found: dict[str, torch.Tensor] = {}
        for name, uses in self.maps.items():
            for i, sums in enumerate(uses):
                for part in ("inputs", "outputs", "scalars"):
                    found[f"{name}/curvature.{i}.{part}"] = getattr(sums, part)
        for name, diagonal in self.diagonals.items():
            found |= {f"{name}/curvature.squares": diagonal.squares, f"{name}/curvature.scalars": diagonal.scalars}
        return found

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Add up over the ranks of ``group``, each of which saw a part of the data."""
        if world_size(group) > 1:
            for tensor in self.tensors().values():
                all_reduce_(tensor, group)

    # --- the result ---------------------------------------------------------------------------------------------------

    def curvatures(self, format: str) -> Iterator[tuple[str, Curvature]]:
        """H of one parameter after the other, factors in ``format``."""
        for name, param in self.params.items():
            yield name, self._curvature(name, param, format)

    def _curvature(self, name: str, param: torch.Tensor, format: str) -> Curvature:
        if name in self.maps:
            terms = [sums.term(self.rank, format) for sums in self.maps[name]]
            seen = tuple(term for term in terms if term is not None)
            return Curvature(seen) if seen else Curvature(diagonal=torch.zeros(()))
        sums = self.diagonals[name]
        targets, numel = max(float(sums.scalars[0]), 1.0), 1 if sums.squares.dim() else max(param.numel(), 1)
        return Curvature(diagonal=(sums.squares / (targets * numel)).float().cpu())


def curvature_sums(
    model: nn.Module, params: Mapping[str, torch.Tensor], rank: int, sharding: Sharding
) -> CurvatureSums:
    """The sums for a model as it lies on the ranks.

    Raises:
        ValueError: it is sharded, or no rank.
    """
    if sharding.mesh is not None:
        raise ValueError(
            "curvature: expected a whole model, got one sharded by FSDP2, whose maps see a part of the data each; "
            "collect it with a whole model per process and reduce()"
        )
    return CurvatureSums(model, params, rank)

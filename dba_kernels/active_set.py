"""The parameters that have a gradient in a step, cut into batches, and whether they still are what they were."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .anchored import AnchorStep
from .checks import addresses_of, same_place
from .distributed import local
from .state import Witness, same_tensors
from .stepdata import StepScalars, TensorBatch

Kind = tuple[type, torch.dtype, torch.layout, torch.Size, bool]


@dataclass
class ActiveSet:
    """The parameters that have a gradient in this step, cut into batches of one dtype and format combination.

    Holds no gradients: they are free as soon as the caller lets go of them.

    Args:
        index: int64 ``[m]``, where they stand in the plan's scalars.
        parts: the batches.
        positions: per batch, where its parameters stand among the active ones.
        anchors: per batch, the step of its parameters where they are anchored, else None.
        addresses: of the parameters, in the order of the optimizer's groups.
        kinds: what each gradient is, see :func:`kinds_of`.
        states: each parameter's state as it was: the tensors by key, and their addresses.
        witness: the same for a check that costs little.
        plain: whether no parameter is a DTensor.
        scalars: what :meth:`Plan.scalars` has made of it.
    """

    index: torch.Tensor
    parts: list[TensorBatch]
    positions: list[list[int]]
    anchors: list[AnchorStep | None]
    addresses: list[int]
    kinds: list[Kind]
    states: list[tuple[dict[str, torch.Tensor], list[int]]]
    witness: Witness | None
    plain: bool
    scalars: StepScalars | None = None

    def is_current(self, params: list[torch.Tensor], grads: list[torch.Tensor], states: Mapping[Any, Any]) -> bool:
        """Whether parameters and state still are the tensors that the batches were made of, and gradients alike."""
        return self.kinds == kinds_of(grads) and (
            (self.witness is not None and self.witness.sees_no_change(params, states))
            or (
                self.addresses == addresses_of(params)
                and (self.plain or all(same_place(p, g) for p, g in zip(params, grads, strict=True)))
                and all(
                    same_tensors(known, states.get(p)) and addresses == addresses_of(known.values())
                    for p, (known, addresses) in zip(params, self.states, strict=True)
                )
            )
        )

    def batches(self, grads: list[torch.Tensor]) -> list[tuple[TensorBatch, list[torch.Tensor]]]:
        """Each batch with its gradients of this step."""
        parts = grads if self.plain else [local(g) for g in grads]
        if not all(map(torch.Tensor.is_contiguous, parts)):
            parts = [g.contiguous() for g in parts]
        return [(part, [parts[i] for i in at]) for part, at in zip(self.parts, self.positions, strict=True)]


def kinds_of(grads: list[torch.Tensor]) -> list[Kind]:
    """Class, dtype, layout, shape, and whether it is on the CPU."""
    return list(map(operator.attrgetter("__class__", "dtype", "layout", "shape", "is_cpu"), grads))

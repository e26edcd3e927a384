"""Weights that must not change while gradients are collected: noticed whichever way they are written or replaced."""

from __future__ import annotations

import torch
from torch import nn

from .distributed import local

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRITTEN = "do not step an optimizer, load weights or replace parameters meanwhile"


def checksum(tensor: torch.Tensor) -> int:
    """64-bit sum over all bits, weighted by row; one read of the tensor, and no copy where it is contiguous."""
    part = local(tensor.detach())
    part = torch.view_as_real(part) if part.is_complex() else part
    if part.numel() == 0:  # a rank may hold no rows
        return 0
    bits = part.contiguous().view(_INTEGERS[part.element_size()])
    rows = bits.reshape(bits.shape[0] if bits.dim() > 1 else 1, -1).sum(dim=1, dtype=torch.int64)
    odd = 2 * torch.arange(rows.numel(), device=rows.device) + 1  # so that exchanged rows are noticed
    return int((rows * odd).sum())


class WeightWatch:
    """What the parameters of a model were when it was made.

    Args:
        model: all its parameters are watched, frozen ones too: gradients depend on them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = [(name, param, param._version) for name, param in model.named_parameters()]
        self._sums = [checksum(param) for _, param, _ in self._known]

    def check(self, replaced: bool = True) -> None:
        """Notice writes that torch counts, and parameters that are others now; reads no weight.

        Args:
            replaced: False while a wrapper such as FSDP2 puts tensors of its own in the parameters' places.

        Raises:
            RuntimeError: naming the parameter.
        """
        for name, param, version in self._known:
            if param._version != version:
                raise RuntimeError(
                    f"parameter {name!r}: expected untouched weights, got {param._version - version} writes during the "
                    f"collection; {_WRITTEN}"
                )
        if replaced:
            now = dict(self._model.named_parameters())
            for name, param, _ in self._known:
                if now.pop(name, None) is not param:
                    raise RuntimeError(
                        f"parameter {name!r}: expected the one that the collection began with, got another in its "
                        f"place; {_WRITTEN}"
                    )
            for name in now:
                raise RuntimeError(
                    f"parameter {name!r}: expected none of that name, as when the collection began; {_WRITTEN}"
                )

    def check_content(self) -> None:
        """Notice writes that torch does not count (``.data``, fused optimizers); reads every weight once.

        Raises:
            RuntimeError: naming the parameter.
        """
        self.check()
        for (name, param, _), before in zip(self._known, self._sums, strict=True):
            if checksum(param) != before:
                raise RuntimeError(
                    f"parameter {name!r}: expected untouched weights, got others than the collection began with; "
                    f"{_WRITTEN}"
                )

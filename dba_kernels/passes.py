"""How a micro-batch's gradients come into the sums: of a model that this process holds whole, or of a sharded one."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .distributed import Sharding, local
from .sums import GradientSums
from .weights import WeightWatch


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch before its backward pass.

    Args:
        loss: scalar, its mean loss.
        tokens: its number of target tokens; None where nobody counts them.
        weight: w_i of eq. 1.
        finite: whether its loss is.
    """

    loss: torch.Tensor
    tokens: int | None
    weight: float
    finite: bool


class Untouched:
    """Within it a model is in evaluation mode and without gradients; afterwards its modes and gradients are restored.

    Args:
        model: its modules' modes and all its weights are watched.
        params: by name, those whose gradients are put aside.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
        self.model, self.params = model, params
        self._weights: WeightWatch | None = None

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._grads = [(param, param.grad) for param in self.params.values()]
        self._weights = self._weights or WeightWatch(self.model)
        self._weights.check_content()  # between two passes, too
        self.model.eval()
        for param in self.params.values():
            param.grad = None

    def __exit__(self, *exception: object) -> None:
        for module, training in self._modes:
            module.training = training
        for param, grad in self._grads:
            param.grad = grad

    def check(self, replaced: bool = True) -> None:
        """:meth:`.weights.WeightWatch.check`, once it has been entered."""
        if self._weights is not None:
            self._weights.check(replaced)

    def check_content(self) -> None:
        """:meth:`.weights.WeightWatch.check_content`, once it has been entered."""
        if self._weights is not None:
            self._weights.check_content()


class WholeModel:
    """Every parameter has a hook that adds its gradient to the sum as soon as it is complete, and releases it.

    Args:
        params: by name, those whose gradients are summed.
        sums: what they are added to.
        sharding: of the model.

    Attributes:
        alone: whether no other process takes part in a backward pass.
        weight: w_i during a backward pass, else None; it stays where a pass fails half-way.
    """

    alone = True

    def __init__(self, params: Mapping[str, torch.Tensor], sums: GradientSums, sharding: Sharding) -> None:
        self.params, self.sums, self.sharding = params, sums, sharding
        self.weight: float | None = None
        self._seen: set[str] = set()

    def watch(self, stack: contextlib.ExitStack) -> None:
        """See gradients until ``stack`` is closed."""
        for index, (name, param) in enumerate(self.params.items()):
            hook = param.register_post_accumulate_grad_hook(functools.partial(self._consume, index, name))
            stack.callback(hook.remove)
        for handle in [] if self.sums.curvature is None else self.sums.curvature.attach():
            stack.callback(handle.remove)

    def _consume(self, index: int, name: str, param: torch.Tensor) -> None:
        """Hook: the gradient of ``param`` is complete."""
        if self.weight is None:
            raise RuntimeError(f"gradient of {name!r}: expected collector.backward(loss), got another backward()")
        if name in self._seen:
            raise RuntimeError(
                f"parameter {name!r}: expected one complete gradient per micro-batch, got a second; use checkpointing "
                "with use_reentrant=False"
            )
        assert param.grad is not None  # this hook runs after it was written
        self._seen.add(name)
        self.sums.add(index, param.grad, self.weight)
        param.grad = None

    def agreed(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch as all that take part in it see it."""
        return batch

    def backward(self, batch: MicroBatch) -> None:
        """Backward pass of a micro-batch, its gradients added to the sums."""
        self._seen.clear()
        self.weight = batch.weight
        if self.sums.curvature is not None:
            self.sums.curvature.begin(batch.tokens or 0)
        batch.loss.backward()
        self.weight = None
        if self.sums.curvature is not None:
            self.sums.curvature.end()
        self.sums.commit(batch.weight)

    def check_reducible(self) -> None:
        """Whether sums of several processes may be added up.

        Raises:
            ValueError: they are sums over all of them already.
        """

    def check_destination(self, save_to: str | os.PathLike[str] | None) -> None:
        """Refuse a missing file where one is needed."""

    def complete(self) -> None:
        """Bring the sums together, when all micro-batches have been seen."""

    def where_written(self, act: Callable[[], object], means: Iterable[object] = ()) -> None:
        """Call ``act`` in the process that writes; it may take from ``means``."""
        act()


class ShardedModel(WholeModel):
    """FSDP2 itself hands over the rows of the gradient when it has averaged them; they stay until the pass ends."""

    alone = False

    def watch(self, stack: contextlib.ExitStack) -> None:
        pass

    def agreed(self, batch: MicroBatch) -> MicroBatch:
        """What all ranks hold together: this rank's share of the loss, and the rest as the ranks agree on it.

        FSDP2 divides the sum over N ranks by N, so the gradient of w_r · N / Σw · loss_r becomes Σ w_r g_r / Σw.
        """
        for name, param in self.params.items():
            if param.grad is not None:
                raise RuntimeError(f"gradient of {name!r}: expected collector.backward(loss), got another backward()")
        mesh, here = self.sharding.mesh, [batch.weight, float(batch.tokens or 0), float(not batch.finite)]
        sums = self.sharding.over_mesh_(torch.tensor(here, dtype=torch.float64, device=mesh.device_type))
        weight, tokens, broken = sums.tolist()
        share = batch.weight * mesh.size() / weight if weight > 0 else 0.0
        counted = None if batch.tokens is None else int(tokens)
        return replace(batch, loss=batch.loss * share, tokens=counted, weight=weight, finite=broken == 0)

    def backward(self, batch: MicroBatch) -> None:
        self.weight = batch.weight
        batch.loss.backward()
        self.weight = None
        grads = [None if param.grad is None else local(param.grad) for param in self.params.values()]
        for param in self.params.values():
            param.grad = None
        self.sums.add_rows(grads, batch.weight)

    def check_reducible(self) -> None:
        raise ValueError(
            "reduce(): expected a whole model on every rank, got one sharded by FSDP2, whose gradients have been "
            "summed over the ranks; leave the call (or group=) out"
        )

    def check_destination(self, save_to: str | os.PathLike[str] | None) -> None:
        if save_to is None:
            raise ValueError(
                "save_to: expected the path of a file for a model sharded over ranks, got None; one of them writes the "
                "whole, choose a folder that all ranks see"
            )

    def complete(self) -> None:
        self.sums.reduce_rows()

    def where_written(self, act: Callable[[], object], means: Iterable[object] = ()) -> None:
        """``act`` on the mesh's first rank; all go on together, or end together, whatever became of it."""

        def attempt() -> None:
            try:
                if self.sharding.first:
                    act()
            finally:
                for _ in means:  # gathering takes all ranks to the end
                    pass

        self.sharding.together(attempt)

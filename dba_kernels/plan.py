"""How a step travels from ``DBAAdamW.step()`` to a kernel, and what is laid out once for all steps: the plan.

A plan is made lazily, at the first step and again whenever parameters, state or groups were replaced, because
frameworks create the optimizer first and shard, move or swap its tensors afterwards. Everything that must outlive a
plan is in ``optimizer.state`` and ``optimizer.param_groups``. It knows no optimizer: it is given those two.

One step, and the types that it passes through (the data are in :mod:`.stepdata`, formats in :mod:`.formats`)::

    DBAAdamW.step()          parameters that have a gradient, and these gradients
      Plan.activate()        → ActiveSet, kept per set of parameters: TensorBatches of one ParamTensors per parameter
                               (weight, state, stored ĝ_G, seed), cut by device, dtypes and formats
      Plan.upload_hyper()    lr, betas, … of the groups → StepScalars.hyper, where they changed
      Method                 → StepSettings (T, k₀, correction, clipping), StepOverrides (γ and α of a user's functions)
      ops.similarity()       TensorBatch, gradients → StepScalars.sums                       one pass over g, ĝ_G
      Plan.gather_sums()     other devices' sums and other ranks' rows → StepScalars.sums
      ops.coefficients()     StepScalars, StepSettings, StepOverrides → StepScalars.coefficients
      ops.step()             TensorBatch, gradients, StepScalars.coefficients → weights, state  one pass over all
      AnchorStep.run()       for anchored parameters: λ H δ added to the gradients, then ops.step(), by blocks

``ops`` picks the backend and hands on the same types; a backend keeps its own view of a batch (pointers,
descriptors) in ``TensorBatch.cache``. The native one runs the last three in one call, ``ops.fused_step()``.
"""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections import defaultdict
from dataclasses import fields
from typing import Any

import torch

from . import captured, ops
from .active_set import ActiveSet, kinds_of
from .anchored import AnchorStep
from .base_model import Groups, names_of, normalize_name
from .checks import addresses_of, check_grad, check_state, check_storage
from .distributed import Sharding, local
from .factors import Curvature
from .formats import matrix_shape
from .global_gradient import GlobalGradient, shrinkage
from .state import (
    StateOptions,
    States,
    Witness,
    formats_of,
    prepare,
    prepare_origin,
    replayed_bias_correction,
    steps_done,
)
from .stepdata import (
    BY_PLAN,
    CHECKED,
    NO_OVERRIDES,
    UPDATED_PARTS,
    Coefficient,
    Hyper,
    ParamTensors,
    StepOverrides,
    StepScalars,
    Summary,
    TensorBatch,
)

NUMBERS = frozenset({float, int, bool})

CACHED_ACTIVE_SETS = 8
"""Sets of parameters with a gradient whose batches are kept; a model whose set changes every step rebuilds them."""


class Plan:
    """Scalars on one device (that of the first parameter), one entry per parameter: those of ``stepdata.StepScalars``.

    Raises:
        ValueError: the parameters do not fit the global gradient, or their state the optimizer's formats.
    """

    def __init__(
        self,
        groups: Groups,
        states: States,
        options: StateOptions,
        global_gradient: GlobalGradient | None,
        missing: str,
        backend: str,
        shrink: bool = False,
    ):
        self.options, self._backend = options, backend
        self.params = [p for group in groups for p in group["params"]]
        self._index = {id(p): i for i, p in enumerate(self.params)}  # the plan keeps p alive: its id stays its own
        full_names = names_of(groups)
        self.names = [normalize_name(name) for name in full_names]
        self.sharding = Sharding(zip(full_names, self.params, strict=True))
        self.device = self.params[0].device
        self._grouping = _grouping(groups)
        self._active: dict[Any, ActiveSet] = {}
        self.last: ActiveSet | None = None

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        n = len(self.params)
        self.sums, self.report, self.coefficients = empty(n, 2), empty(n, 2), empty(n, Coefficient.COUNT)
        self.summary, self.hyper = empty(Summary.COUNT), empty(len(groups), Hyper.COUNT)
        owner = [i for i, group in enumerate(groups) for _ in group["params"]]
        self.group = torch.tensor(owner, device=self.device)
        self._uploaded: list[tuple[float, ...]] | None = None
        self._given: list[tuple[Any, ...]] | None = None
        self._captured = False
        self._sums_elsewhere: dict[torch.device, torch.Tensor] = {}
        self.cut = torch.tensor([[rows is not None] for rows in self.sharding.rows], device=self.device)

        steps = [steps_done(states.get(p, {}), name) for p, name in zip(self.params, self.names, strict=True)]
        self.steps = torch.tensor(steps, dtype=torch.float32, device=self.device)
        self._step_of = [self.steps.select(0, row) for row in range(n)]  # one view each: active sets know state by it
        self.bias_corrections = torch.tensor(
            [
                [replayed_bias_correction(float(beta), step) for beta in groups[g]["betas"]]
                for step, g in zip(steps, owner, strict=True)
            ],
            dtype=torch.float64,
            device=self.device,
        )
        done = groups[0]["steps_done"]
        if done is None:  # a fresh start, or a state dict of torch's own
            done = max(steps)
        self.calls = int(done) + int(groups[0]["steps_skipped"])  # of step(), this plan's and those before it
        self.counters = torch.tensor([done, groups[0]["steps_skipped"]], dtype=torch.int64, device=self.device)
        for param in self.params:
            if "step" in states.get(param, {}):
                states[param]["step"] = self._step_of[self._index[id(param)]]
        self._bind(global_gradient, missing, fresh=done == 0, shrink=shrink)

    def _bind(self, gg: GlobalGradient | None, missing: str, fresh: bool, shrink: bool) -> None:
        """Find the stored global gradient of every parameter by name; on a fresh run check the base model too."""
        self.stored: list[Any] = [None] * len(self.params)
        self.curvatures: list[Curvature | None] = [None] * len(self.params)
        global_sq = [-1.0] * len(self.params)
        if gg is not None:
            others = "ignore" if missing == "adamw" else "error"
            gg.check_model(zip(self.names, self.params, strict=True), weights=fresh, missing=others, extra=others)
            for i, name in enumerate(self.names):
                if name in gg:
                    stored = gg.stored(name, self.sharding.rows[i])
                    factor = shrinkage(gg.record(name)) if shrink else 1.0  # eq. 13, once for all steps
                    stored = stored.scaled(factor) if shrink else stored
                    self.stored[i] = ops.bind(stored, self.params[i].device, self._backend)
                    global_sq[i] = gg.global_sq(name) * factor**2
                if name in self.options.anchored:
                    found = gg.curvature(name, self.sharding.rows[i])
                    self.curvatures[i] = None if found is None else found.to(self.params[i].device)
            if len(gg) > 0:
                self._warn_unbound()
        self.global_sq = torch.tensor(global_sq, dtype=torch.float64, device=self.device)

    def _warn_unbound(self) -> None:
        """Under ``missing="adamw"`` a name that was not recognised would go unnoticed."""
        trainable = [stored for stored, p in zip(self.stored, self.params, strict=True) if p.requires_grad]
        unbound = sum(stored is None for stored in trainable)
        if unbound:
            warnings.warn(
                f"global_gradient: {unbound} of {len(trainable)} trainable parameters have none and get plain AdamW's "
                "update, as missing='adamw' asks",
                stacklevel=2,
            )

    # --- one step -----------------------------------------------------------------------------------------------------

    def activate(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], groups: Groups, states: States
    ) -> ActiveSet | None:
        """The active set of these parameters; None where this plan has gone stale."""
        if self._grouping != _grouping(groups):
            return None
        key = tuple(map(id, params))
        active = self._active.get(key)
        if active is None:
            if len(self._active) == CACHED_ACTIVE_SETS:
                self._active.pop(next(iter(self._active)))
            active = self._active[key] = self._build(params, grads, states)
        elif not active.is_current(params, grads, states):
            return None
        self.last = active
        return active

    def _build(self, params: list[torch.Tensor], grads: list[torch.Tensor], states: States) -> ActiveSet:
        index = [self._index[id(p)] for p in params]
        by_format: dict[tuple[Any, Any, Any, bool, tuple[str, str, str]], list[int]] = defaultdict(list)
        for i, (param, grad, at) in enumerate(zip(params, grads, index, strict=True)):
            check_grad(param, grad, self.names[at])
            check_storage(f"grad of {self.names[at]!r}", local(grad))
            stored = self.stored[at]
            formats = (*self._prepare(param, at, states), "none" if stored is None else stored.format)
            anchored = self.curvatures[at] is not None
            by_format[param.device, param.dtype, grad.dtype, anchored, formats].append(i)
        kept = [{k: v for k, v in states[p].items() if torch.is_tensor(v)} for p in params]
        parts = [
            TensorBatch(*formats, [self._tensors_of(params[i], states[params[i]]) for i in at], {CHECKED: BY_PLAN})
            for (*_, formats), at in by_format.items()
        ]
        pulled = [anchored for (*_, anchored, _) in by_format]
        return ActiveSet(
            index=torch.tensor(index, device=self.device),
            parts=parts,
            positions=list(by_format.values()),
            anchors=[self._anchors(part, states) if yes else None for part, yes in zip(parts, pulled, strict=True)],
            addresses=addresses_of(params),
            kinds=kinds_of(grads),
            states=[(tensors, addresses_of(tensors.values())) for tensors in kept],
            witness=Witness.of(params, states),
            plain=self.sharding.mesh is None,
        )

    def _prepare(self, param: torch.Tensor, index: int, states: States) -> tuple[str, str]:
        """State of ``param``, allocated or adopted; its formats."""
        part, name = local(param), self.names[index]
        check_storage(f"parameter {name!r}", part)
        if not part.is_contiguous() or part.is_complex():
            kind = "complex" if part.is_complex() else f"strides {part.stride()}"
            raise ValueError(
                f"parameter {name!r}: expected real, contiguous storage, got {kind}; replace its data first"
            )
        formats = formats_of(param, self.options)
        prepare(states[param], param, *formats, name)
        if self.curvatures[index] is not None:
            prepare_origin(states[param], param, name)
        states[param]["step"] = self._step_of[index]
        check_state(name, part, states[param], *formats)
        return formats

    def _anchors(self, batch: TensorBatch, states: States) -> AnchorStep:
        """The step of a batch of anchored parameters."""
        index = [tensors.index for tensors in batch.tensors]
        origins = [local(states[self.params[at]]["anchor"]) for at in index]
        return AnchorStep.of(batch, origins, [self.curvatures[at] for at in index], self.sharding)

    def _tensors_of(self, param: torch.Tensor, own: dict[str, Any]) -> ParamTensors:
        """The record of ``param``, whose state is ``own``."""
        index = self._index[id(param)]
        first_row = (self.sharding.rows[index] or (0, 0))[0]
        return ParamTensors(
            index=index,
            param=local(param),
            **{part: local(own[part]) for part in UPDATED_PARTS if part in own},
            global_grad=self.stored[index],
            seed=zlib.crc32(self.names[index].encode()),
            offset=first_row * matrix_shape(tuple(param.shape))[1],
        )

    def due_anchors(self, active: ActiveSet, every: int) -> list[AnchorStep | None]:
        """The anchors of this call of ``step()``: those of every ``every``-th one, else none.

        Raises:
            ValueError: a CUDA graph is being captured, whose replays would all do as this call does.
        """
        self.calls += 1
        if every > 1 and any(active.anchors) and captured.capturing(self.device):
            raise ValueError(
                f"anchor_every: expected 1 while a CUDA graph is captured, which repeats a step, got {every}"
            )
        return active.anchors if self.calls % every == 0 else [None] * len(active.anchors)

    def upload_hyper(self, groups: Groups) -> None:
        """Write the groups' hyperparameters where they changed; tensors are copied on the device.

        Raises:
            ValueError: a tensor on the CPU while a CUDA graph is captured, which would never read it again.
        """
        capturing = captured.capturing(self.device)
        self._captured |= capturing
        given = [(g["lr"], *g["betas"], g["eps"], g["weight_decay"], g["maximize"]) for g in groups]
        numbers = NUMBERS.issuperset(map(type, itertools.chain.from_iterable(given)))  # comparing tensors would wait
        if numbers and given == self._given and not self._captured:
            return
        self._given = given if numbers else None
        rows, tensors = [], []
        for i, (*values, maximize) in enumerate(given):
            values.append(1 - 2 * bool(maximize))
            tensors += [(i, column, value) for column, value in enumerate(values) if torch.is_tensor(value)]
            rows.append(tuple(math.nan if torch.is_tensor(value) else float(value) for value in values))
        if rows != self._uploaded or self._captured:  # a replay in between may have written the values of its capture
            # A fresh pinned buffer each time: one that is reused might be overwritten before its copy has completed.
            pin = self.device.type == "cuda" and torch.cuda.is_available()
            host = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=pin)
            if capturing:
                captured.keep(host)
            self.hyper.copy_(host, non_blocking=True)
        for i, column, value in tensors:
            if capturing and value.device.type == "cpu":
                raise ValueError(
                    f"{('lr', 'betas', 'betas', 'eps', 'weight_decay')[column]} of group {i}: expected a number or a "
                    f"tensor on {self.device} while a CUDA graph is captured, got a tensor on the CPU, which no replay "
                    "would read again; move it to the GPU, or give a number, which the graph then keeps"
                )
            self.hyper.select(0, i).select(0, column).copy_(value.squeeze(), non_blocking=True)

        betas = slice(Hyper.BETA1, Hyper.BETA2 + 1)
        if self._uploaded is not None and [row[betas] for row in rows] != [row[betas] for row in self._uploaded]:
            # A schedule of β: as in torch, the corrections are those of steps all done with today's values.
            powers = self.hyper[:, betas].index_select(0, self.group) ** self.steps.double().unsqueeze(1)
            self.bias_corrections.copy_(1.0 - powers)
        self._uploaded = rows

    def scalars(self, active: ActiveSet) -> StepScalars:
        """What ``coefficients`` reads and writes."""
        if captured.capturing(self.device):
            captured.keep(self, active)
        if active.scalars is None:
            own = (field.name for field in fields(StepScalars) if field.name != "active")
            active.scalars = StepScalars(active=active.index, **{name: getattr(self, name) for name in own})
        return active.scalars

    def unscaled_sums(
        self, active: ActiveSet, loss_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """⟨g_D, ĝ_G⟩, ‖g_D‖² and ‖ĝ_G‖² of every parameter, of the unscaled gradients; 0 where nothing is bound."""
        scale = self.hyper.select(1, Hyper.SIGN).index_select(0, self.group)
        if loss_scale is not None:
            scale = scale / loss_scale.double()
        used = torch.zeros_like(scale).index_fill_(0, active.index, 1.0) * (self.global_sq >= 0)
        dot, grad_sq = self.sums.select(1, 0) * scale, self.sums.select(1, 1) * scale.square()
        dot, grad_sq, global_sq = (torch.where(used > 0, x, 0.0) for x in (dot, grad_sq, self.global_sq))
        return dot, grad_sq, global_sq

    # Models spread over several devices: each reduces into its own sums and reads its own copy of the coefficients.

    def sums_on(self, batch: TensorBatch) -> torch.Tensor:
        if batch.device == self.device:
            return self.sums
        return self._sums_elsewhere.setdefault(batch.device, torch.zeros_like(self.sums, device=batch.device))

    def gather_sums(self, active: ActiveSet) -> None:
        for batch in (part for part in active.parts if part.device != self.device):
            index = [tensor.index for tensor in batch.tensors]
            self.sums[index] = self._moved(self._sums_elsewhere[batch.device][index], self.device)
        if self.sharding.communicates:
            # Every rank has summed over its rows; what all ranks hold whole, one of them brings in.
            sums = self.sums.index_select(0, active.index)
            if not self.sharding.leads:
                sums = sums.where(self.cut.index_select(0, active.index), 0.0)
            self.sums.index_copy_(0, active.index, self.sharding.sum_(sums))

    def coefficients_on(self, batch: TensorBatch) -> torch.Tensor:
        return self._moved(self.coefficients, batch.device)

    def overrides(
        self, loss_scale: torch.Tensor | None, found_inf: torch.Tensor | None, gamma: torch.Tensor | None
    ) -> StepOverrides:
        """What a GradScaler and a user's schedule say, beside the tables."""
        if loss_scale is None and found_inf is None and gamma is None:
            return NO_OVERRIDES  # which need no check
        return StepOverrides(self.here(loss_scale), self.here(found_inf), gamma)

    def here(self, scalar: torch.Tensor | None) -> torch.Tensor | None:
        """A GradScaler's tensor, which lies where the loss is, beside the tables."""
        return None if scalar is None else self._moved(scalar, self.device)

    @staticmethod
    def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.to(device, non_blocking=device.type != "cpu")  # the host reads what comes to it at once


def _grouping(groups: Groups) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in groups]

"""``DBAAdamW``: AdamW whose gradient is boosted by a stored global gradient and whose step is corrected by it.

What is laid out once and reused by every step is in :mod:`.plan`. Between a plan's making and its end nothing in
``step()`` reads a value back from the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch.optim import Optimizer

from . import ops
from .active_set import ActiveSet
from .base_model import check_param_names, names_of
from .formats import PARAM_FORMATS, STATE_FORMATS, check_name
from .global_gradient import GlobalGradient
from .method import BoostSchedule, Correction, Method, check_group
from .metrics import metrics
from .param_groups import check_hyperparameters, checked_flag, checked_params, checked_state_dict
from .plan import Plan
from .saved_state import check_states, for_torch, restore_uncast, to_saved, unlocked
from .state import StateOptions, allocate, only_allocates


class DBAAdamW(Optimizer):
    r"""Dynamic Boosted Annealing on AdamW; without a global gradient it *is* AdamW.

    With :math:`g_D` the gradient of the domain loss and :math:`\hat g_G` the stored global gradient:

    .. math::
        \gamma_t &= \mathrm{clamp}(k_0 (1 - t/T),\ 0,\ \gamma_{max})              & \text{eq. 2} \\
        g_B &= \gamma_t \hat g_G + (1 - \gamma_t) g_D                             & \text{eq. 3} \\
        \varphi_t &= \langle g_D, \hat g_G\rangle / (\|g_D\| \|\hat g_G\|)        & \text{eq. 4} \\
        \alpha_t &= \mathrm{clamp}(1 - \varphi_t,\ \alpha_{min},\ \alpha_{max})   & \text{eq. 5, our reading} \\
        m &\leftarrow \beta_1 m + (1-\beta_1) g_B, \quad v \leftarrow \beta_2 v + (1-\beta_2) g_B^2 & \text{eq. 7} \\
        \theta &\leftarrow \theta(1 - \eta_t\lambda) - \eta_t\alpha_t \hat m/(\sqrt{\hat v} + \epsilon) & \text{eq. 8}

    Order: unscale → clip (by the norm of :math:`g_D`) → boost → moments → corrected update. With a global gradient or
    a clip threshold, a step with a non-finite gradient is skipped whole, counted, and changes nothing.

    Parameters that FSDP2 (``fully_shard``) has cut by rows work as they are, with replication (HSDP) too: formats
    follow from the global shape, the global gradient is cut along, state is DTensors of the parameter's layout, and
    rounding does not depend on the number of ranks. With a global gradient or a clip threshold all ranks must call
    ``step()`` together: they share one all-reduce of two float64 per parameter. The first step refuses ranks with
    another global gradient or other settings of it. State dicts that gather whole tensors (``full_state_dict``) cannot
    hold ``split16``: torch.distributed sends no int16.

    Args:
        params: parameters, or groups, as for ``torch.optim.AdamW``. With a global gradient they must carry names:
            ``model.named_parameters()``, or groups of ``(name, parameter)`` pairs.
        lr: η, float or scalar tensor.
        betas: (β₁, β₂).
        eps: ε, outside the square root.
        weight_decay: λ, decoupled.
        global_gradient: a :class:`~dba_kernels.GlobalGradient`, its path, or None for plain AdamW.
        total_steps: T, optimizer steps of the run (not micro-batches); needed with a global gradient. ``"later"``:
            :meth:`set_total_steps` will give it before the first step, as a framework does that counts its steps only
            when it has started.
        boost: ``"auto"`` (k₀ = min(200, 0.003/lr)/T, at most 0.5: ``bench/quality/README.md``; lr is the largest
            group's at construction; 0, no boost, with an anchor), ``"paper"`` (k₀ = 200/T), k₀ as a number, or
            ``f(step, total_steps) → γ``; ``step``, an int64 scalar tensor, counts steps done, skipped ones excluded.
        boost_max: upper clamp of γ, in [0, 1].
        correction: ``"cosine"`` (eq. 5), ``"none"`` (α = 1), ``"agem"`` or ``"pcgrad"`` (projections in place of the
            boost, against the *stored* global gradient, where the originals recompute it at every step), or
            ``f(dot, grad_sq, global_sq) → α`` on float64 tensors, one entry per parameter, of the unscaled and
            unclipped gradient; clamped to ``correction_bounds``, and 1 where it is NaN.
        correction_scope: ``"tensor"`` (φ per parameter) or ``"global"`` (one φ for the model).
        correction_bounds: (α_min, α_max).
        max_grad_norm: clips g_D by its norm over all parameters, as ``clip_grad_norm_``, inside the step; None: never.
        anchor: λ, with which the general loss's second order holds the weights near the base model (eq. 10, ours),
            where the global gradient was collected with ``curvature``. λ H (θ − θ₀) is added to the clipped gradient;
            similarity and clipping do not see it. ``"auto"``: 0.04/lr (lr as for ``boost``), at least the file's
            calibration κ, with which it weighs as much as the domain loss (``bench/quality/README.md``); 0: none.
        anchor_every: k; in every k-th step k λ H (θ − θ₀) is added, and the others cost nothing more.
        shrink: weigh each tensor of ĝ_G by its reliability, s = max(0, 1 − 1/SNR) (eq. 13, ours), from the statistics
            in its file. None: with an anchor.
        state_format: ``"fp32"``, ``"bf16"`` or ``"int8"`` moments. 1-D and small tensors keep fp32.
        param_format: how parameters below fp32 keep what rounding would lose: ``"native"`` (they lose it),
            ``"split16"`` (a 16-bit remainder in the state: together the exact fp32 value), ``"split8"`` (8 bits,
            stochastically rounded), ``"master"`` (an fp32 copy). ``"auto"``: split16. fp32 and fp64 parameters are
            always native. Weights that somebody writes between steps count, whatever is kept beside them.
        missing: ``"error"``, or ``"adamw"`` to update parameters that have no global gradient by plain AdamW, with a
            warning that counts them.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.
        foreach, fused, capturable: accepted; every step is multi-tensor and fused, its counters on the device.
        maximize: ascend instead of descend; g_D is negated, ĝ_G is not.
        amsgrad, differentiable: refused if True.

    Raises:
        ValueError: on an argument outside its range, or unnamed parameters with a global gradient; at the first
            ``step()`` on parameters that do not fit the global gradient.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = DBAAdamW(model.named_parameters(), lr=1e-5)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _step_supports_amp_scaling = True  # GradScaler hands over its scale and its found_inf instead of synchronising

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        global_gradient: GlobalGradient | str | os.PathLike[str] | None = None,
        total_steps: int | str | None = None,
        boost: str | float | BoostSchedule = "auto",
        boost_max: float = 0.5,
        correction: str | Correction = "cosine",
        correction_scope: str = "tensor",
        correction_bounds: tuple[float, float] = (0.0, 2.0),
        max_grad_norm: float | None = None,
        anchor: str | float = "auto",
        anchor_every: int = 4,
        shrink: bool | None = None,
        state_format: str = "fp32",
        param_format: str = "auto",
        missing: str = "error",
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        self.backend = ops.check_backend(backend)
        self.method = Method(
            *(global_gradient, total_steps, boost, boost_max),
            *(correction, correction_scope, correction_bounds, max_grad_norm),
            *(anchor, anchor_every),
        )
        check_name("state_format", state_format, STATE_FORMATS)
        check_name("param_format", param_format, ("auto", *PARAM_FORMATS))
        self.shrink = bool(self.method.anchored) if shrink is None else checked_flag("shrink", shrink)
        self.missing = check_name("missing", missing, ("error", "adamw"))
        kept = "split16" if param_format == "auto" else param_format
        self.options = StateOptions(kept, state_format, self.method.anchored)
        self._plan: Plan | None = None
        super().__init__(
            checked_params(params),
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                amsgrad=amsgrad,
                maximize=maximize,
                foreach=foreach,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
                decoupled_weight_decay=True,
                global_gradient=self.method.identity(),
                steps_done=None,
                steps_skipped=0,
            ),
        )
        self.method.begin(max(float(group["lr"]) for group in self.param_groups))
        self._write_identity()

    @property
    def global_gradient(self) -> GlobalGradient | None:
        """ĝ_G, or None for plain AdamW."""
        return self.method.global_gradient

    def _write_identity(self) -> None:
        """Into the groups and their defaults, where a state dict finds it."""
        for group in (*self.param_groups, self.defaults):
            group["global_gradient"] = self.method.identity()

    # --- the length of the run ----------------------------------------------------------------------------------------

    @property
    def awaits_total_steps(self) -> bool:
        """Whether ``total_steps="later"`` still waits for :meth:`set_total_steps`."""
        return self.method.awaits_total_steps

    def set_total_steps(self, total_steps: int) -> None:
        """Set T of eq. 2, before the first step or to change a run's length; a named boost follows it.

        Without effect where nothing depends on T: no global gradient, or ``"agem"`` and ``"pcgrad"``. A loaded state
        sets the T it was saved with where this optimizer still awaits one; another T after that is warned about.

        Args:
            total_steps: T, optimizer steps of the whole run, those done included.

        Raises:
            ValueError: fewer than 1.
        """
        self.method.set_total_steps(total_steps)
        self._write_identity()

    # --- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            ValueError: a gradient of an unsupported dtype or layout; at the first step, parameters that the global
                gradient does not fit, or ``total_steps="later"`` that nobody has set.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads = [], []
        for group in self.param_groups:
            for param in group["params"]:
                if (grad := param.grad) is not None:
                    params.append(param)
                    grads.append(grad)
        if not params:
            return loss
        if not self.state and only_allocates(self.param_groups, self._named(), grads):
            used = [(name, param) for name, param in self._named() if param.grad is not None]
            allocate(used, self.state, self.options)
            return loss
        if self.awaits_total_steps:
            raise ValueError(
                "total_steps: expected the number of optimizer steps of the run, got 'later'; call "
                "optimizer.set_total_steps(T) before the first step (in the Hugging Face Trainer, DBACallback does)"
            )
        plan, active = self._activate(params, grads)
        plan.upload_hyper(self.param_groups)
        batches = active.batches(grads)
        settings, scalars = self.method.settings, plan.scalars(active)
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        overrides = plan.overrides(*scaler, self.method.scheduled_boost(plan.counters))
        sums_here = not (settings.reduce and plan.sharding.communicates)
        anchors = plan.due_anchors(active, settings.anchor_every)
        one_call = sums_here and self.method.correction is None and not any(anchors)
        if one_call and ops.fuses(batches, self.backend):
            ops.fused_step(batches, scalars, settings, overrides, self.backend)
        else:
            if settings.reduce:
                for batch, batch_grads in batches:
                    ops.similarity(batch, batch_grads, plan.sums_on(batch), self.backend)
                plan.gather_sums(active)
            if self.method.correction is not None:
                sums = plan.unscaled_sums(active, overrides.loss_scale)
                overrides = replace(overrides, alpha=self.method.corrections(*sums))
            ops.coefficients(scalars, settings, overrides, self.backend)
            for (batch, batch_grads), anchor in zip(batches, anchors, strict=True):
                if anchor is None:
                    ops.step(batch, batch_grads, plan.coefficients_on(batch), self.backend)
                else:
                    anchor.run(batch_grads, plan.coefficients_on(batch), settings.pull, self.backend)
        torch.autograd.graph.increment_version(params)  # kernels write through addresses, which torch does not see
        return loss

    def _activate(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> tuple[Plan, ActiveSet]:
        where = self.param_groups, self.state
        if self._plan is not None:
            if (active := self._plan.activate(params, grads, *where)) is not None:
                return self._plan, active
            self._drop_plan()
        self.method.check_ranks(names_of(self.param_groups))
        plan = Plan(*where, self.options, self.global_gradient, self.missing, self.backend, self.shrink)
        self._plan = plan
        return plan, cast("ActiveSet", plan.activate(params, grads, *where))  # a plan just made is current

    def _drop_plan(self) -> None:
        self._store_counters()
        self._plan = None

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        params = (param for group in self.param_groups for param in group["params"])
        yield from zip(names_of(self.param_groups), params, strict=True)

    # --- what it says -------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Figures of the last step, as plain numbers. This call, and nothing in ``step()``, waits for the device.

        Returns:
            ``steps`` and ``skipped_steps``; and, of the last step: ``grad_norm`` ‖g_D‖ (after unscaling, before
            clipping) and ``clip_factor`` where there is a global gradient or a clip threshold; ``gamma`` γ_t,
            ``boost_ratio`` ‖γ ĝ_G‖ / ‖(1−γ) g_D‖, and ``cosine_*`` φ_t and ``correction_*`` α_t (``mean``, ``min``,
            ``max`` over the parameters that have a global gradient) where there is one; with an anchor
            ``anchor_ratio`` ‖λ H δ‖ / ‖g_D‖ and ``predicted_rise`` κ · ½⟨δ, H δ⟩, the rise of the general loss in nats
            per token that the second order predicts, both of the weights as they are now (of a sharded model, as the
            last step with the anchor found them). After a skipped step they describe the gradients that were refused,
            and need not be finite. Empty before the first step of this object.
        """
        return {} if self._plan is None else metrics(self._plan, self.method.settings, self.method.calibration)

    # --- state --------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        ops.check_devices(f"param_groups[{len(self.param_groups) - 1}]", group["params"])
        if self.global_gradient is not None and "param_names" not in group:
            raise ValueError(
                f"params: expected (name, parameter) pairs, group {len(self.param_groups) - 1} has no names; a global "
                "gradient is bound by name: pass model.named_parameters()"
            )
        self._drop_plan()

    def state_dict(self, format: str = "own") -> dict[str, Any]:
        """As torch's; the groups also carry the steps done and skipped, and the global gradient's path and digest.

        Args:
            format: ``"own"``: what is stored, for this class; groups of int8 moments are saved with settings (``LOCK``
                in :mod:`.saved_state`) on which every torch optimizer fails before it takes codes for numbers.
                ``"torch"``: fp32 moments for ``torch.optim.AdamW``, weights by :func:`~dba_kernels.fp32_state_dict`.
        """
        check_name("format", format, ("own", "torch"))
        self._store_counters()
        packed = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        return for_torch(packed, params) if format == "torch" else to_saved(packed, params)

    def allocate_state(self) -> None:
        """State of every trainable parameter, as the first step would make it; what is there stays."""
        allocate([(name, param) for name, param in self._named() if param.requires_grad], self.state, self.options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of ``torch.optim.AdamW``; nothing is cast to the parameter's dtype.

        ``Optimizer.load_state_dict`` casts state to the parameter's dtype, which would destroy fp32 moments of a bf16
        parameter. Two hooks around it check what is loaded and restore the values as saved.

        Raises:
            ValueError: the state belongs to another global gradient, other parameter names or another kind of Adam.
                Nothing was loaded then.
        """
        saved: dict[str, Any] = {}

        def capture(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            saved.update(unlocked(final))
            self._check_saved_groups(saved["param_groups"])
            check_states(names_of(self.param_groups), saved)
            return saved

        kept_keys = ("global_gradient", "param_names")
        own: list[dict[str, Any]] = [{k: group[k] for k in kept_keys if k in group} for group in self.param_groups]
        hooks = (
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(
                lambda _: restore_uncast(self.state, self.param_groups, saved), prepend=True
            ),
        )
        try:
            super().load_state_dict(checked_state_dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()
        for group, kept in zip(self.param_groups, own, strict=True):
            group.pop("param_names", None)
            group.update(kept)
        self._plan = None
        self.method.take_over(saved["param_groups"][0].get("global_gradient"))
        self._write_identity()

    def _check_saved_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        for i, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):  # torch counts them
            check_hyperparameters(i, saved)
            check_group({**self.defaults, **saved})
            check_param_names(group.get("param_names"), saved.get("param_names"))
            self.method.check_saved(saved.get("global_gradient"))

    def _store_counters(self) -> None:
        if self._plan is not None:
            done, skipped = self._plan.counters.tolist()
            for group in self.param_groups:
                group["steps_done"], group["steps_skipped"] = done, skipped

    def __getstate__(self) -> dict[str, Any]:
        self._store_counters()
        # Without what is made anew (underscored) and the wrapper that a scheduler puts in place of `step`.
        public = {name: v for name, v in vars(self).items() if not name.startswith("_") and not callable(v)}
        return super().__getstate__() | public

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

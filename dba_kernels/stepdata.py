"""What travels from the optimizer to a backend in a step: the parameters' tensors, and scalars in columns.

Plain data without arithmetic, like :mod:`.formats`, so that every backend may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


class Coefficient:
    """Columns of a step's coefficients, float64 ``[n_params, Coefficient.COUNT]``.

    They carry everything that changes between steps, one row per parameter, so one launch serves parameters
    of different groups and nothing is recompiled or synchronised. Derived factors are computed once, in float64.
    """

    GRAD_WEIGHT = 0  # a · clip factor / loss scale; negative under maximize
    GLOBAL_WEIGHT = 1  # b
    BETA1 = 2
    ONE_MINUS_BETA1 = 3  # a column of its own: fp32(1 - fp32(0.999)) is off by 1e-5
    BETA2 = 4
    ONE_MINUS_BETA2 = 5
    STEP_SIZE = 6  # η_t · α_t / (1 − β₁^k)
    INV_SQRT_BIAS_CORRECTION2 = 7  # 1 / √(1 − β₂^k)
    EPS = 8
    LR_WEIGHT_DECAY = 9  # η_t · λ
    STEP = 10  # k, steps of this parameter with this one; keys the stochastic rounding
    SKIP = 11  # not 0: leave everything untouched
    COUNT = 12


class Hyper:
    """Columns of the hyperparameters, float64 ``[n_groups, Hyper.COUNT]``."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    SIGN = 5  # -1 under maximize
    COUNT = 6


class Summary:
    """Entries of the whole-model summary that a step leaves behind, float64 ``[Summary.COUNT]``."""

    GAMMA = 0
    CLIP_FACTOR = 1
    GRAD_NORM = 2  # ‖g_D‖ after unscaling, before clipping; 0 when no reduction ran
    GLOBAL_NORM = 3  # ‖ĝ_G‖ of what is stored, over the parameters of this step
    COUNT = 4


CORRECTIONS = ("cosine", "none", "agem", "pcgrad")
PROJECTIONS = ("agem", "pcgrad")
"""Corrections that weigh ĝ_G by its conflict with the gradient, not by a schedule."""
CORRECTION_SCOPES = ("tensor", "global")


@dataclass(frozen=True)
class StepSettings:
    """What does not change during a run; the README's symbols in brackets.

    Args:
        boost: k₀ of eq. 2.
        total_steps: T, optimizer steps. 0 where there is no global gradient.
        boost_max: upper clamp of γ.
        correction: one of :data:`CORRECTIONS`.
        scope: one of :data:`CORRECTION_SCOPES`.
        bounds: (α_min, α_max).
        max_grad_norm: clip threshold of ‖g_D‖; None for none.
        reduce: whether the sums exist (there is a global gradient or a clip threshold); without them a non-finite
            gradient is not noticed, as in torch.
        anchor: λ of eq. 10; the kernels never see it, see :mod:`.anchored`.
        anchor_every: steps from one with the anchor to the next.
    """

    boost: float = 0.0
    total_steps: int = 0
    boost_max: float = 0.5
    correction: str = "none"
    scope: str = "tensor"
    bounds: tuple[float, float] = (0.0, 2.0)
    max_grad_norm: float | None = None
    reduce: bool = False
    anchor: float = 0.0
    anchor_every: int = 1

    @property
    def pull(self) -> float:
        """What λ is in a step with the anchor."""
        return self.anchor * self.anchor_every


@dataclass(frozen=True)
class StepOverrides:
    """What a step may be given from outside, each None for nothing.

    Args:
        loss_scale: scalar by which the gradients are too large.
        found_inf: scalar, not 0 to skip the step.
        gamma: scalar γ_t in place of eq. 2.
        alpha: ``[n]`` α_t in place of eq. 5.
    """

    loss_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    alpha: torch.Tensor | None = None


NO_OVERRIDES = StepOverrides()


@dataclass(frozen=True)
class StepScalars:
    """Everything of a step that is not per element, on one device: n parameters, G groups, m ≤ n active parameters.

    Args:
        sums: float64 ``[n, 2]``, ⟨g_D, ĝ_G⟩ and ‖g_D‖² of the gradients as they are.
        global_sq: float64 ``[n]``, ‖ĝ_G‖² of what is stored; −1 for a parameter without a global gradient, which is
            updated by plain AdamW (a = α = 1, b = 0).
        hyper: float64 ``[G, Hyper.COUNT]``.
        group: int64 ``[n]``, each parameter's row of ``hyper``.
        active: int64 ``[m]``, rows of the parameters that have a gradient in this step.
        steps: fp32 ``[n]``, steps done per parameter.
        bias_corrections: float64 ``[n, 2]``, 1 − β₁^k and 1 − β₂^k, kept as the EMA of 1: c ← βc + (1−β).
        counters: int64 ``[2]``, optimizer steps done (the t of γ_t) and steps skipped.
        coefficients: float64 ``[n, Coefficient.COUNT]``.
        report: float64 ``[n, 2]``, φ and α of each parameter (φ 0, α 1 without ĝ_G).
        summary: float64 ``[Summary.COUNT]``.
    """

    sums: torch.Tensor
    global_sq: torch.Tensor
    hyper: torch.Tensor
    group: torch.Tensor
    active: torch.Tensor
    steps: torch.Tensor
    bias_corrections: torch.Tensor
    counters: torch.Tensor
    coefficients: torch.Tensor
    report: torch.Tensor
    summary: torch.Tensor


UPDATED_PARTS = ("param", "remainder", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
"""Parts of :class:`ParamTensors` that a step reads and writes; all but the first have this name in the state too."""


Part = Any
"""A tensor, or None where the formats have no such part: formats are data, so no type can say which."""


@dataclass(frozen=True)
class Factors:
    """A low-rank global gradient as a step multiplies it out, decoded once: ``left @ right`` is ``tensor.flatten(1)``.

    bf16 on GPUs, where bandwidth is what counts; fp32 on CPUs, where bf16 matmul is slow. 2·r·(rows + cols) bytes on a
    GPU, less than int8 has where r < 0.53 · rows · cols / (rows + cols). In time no rank is cheaper than int8: the
    product is written and read once per use, 4 bytes per parameter in place of int8's 1.06.

    Args:
        shape: of the tensor.
        left: ``U · diag(σ)``, ``[rows, r]``.
        right: ``Vᵀ``, ``[r, cols]``.
    """

    shape: tuple[int, ...]
    left: torch.Tensor
    right: torch.Tensor

    @property
    def format(self) -> str:
        return "lowrank"


@dataclass(slots=True)
class ParamTensors:
    """One parameter with everything that a step reads or writes beside its gradient; None where its formats have none.

    Args:
        index: where the parameter stands in the step's scalars.
        param: the weight.
        remainder: of the weight's shape, see :class:`ParamFormat`.
        exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale: see :meth:`StateFormat.parts`; None where nothing steps.
        global_grad: as it is stored; low rank, stored or as :class:`Factors`, only above the backends.
        seed: 32 bits, of the parameter's stochastic rounding.
        offset: position of element 0 in the flattened whole parameter (not 0 only for a row shard).
    """

    index: int
    param: torch.Tensor
    remainder: Part = None
    exp_avg: Part = None
    exp_avg_sq: Part = None
    exp_avg_scale: Part = None
    exp_avg_sq_scale: Part = None
    global_grad: Any = None
    seed: int = 0
    offset: int = 0


CHECKED = "checked"
"""Key of a batch's cache: who has checked it."""
BY_PLAN = "by its plan, and its gradients too"
"""Whoever made the batch sees to it, before every step, that its tensors lie where they lay, and that its gradients are
contiguous and of the same class, dtype, layout, shape and kind of device as in the first one."""


@dataclass
class TensorBatch:
    """Parameters of one dtype and format combination on one device: what one launch updates.

    Args:
        param_format, state_format: names in :data:`PARAM_FORMATS` and :data:`STATE_FORMATS`.
        global_format: name in :data:`STORAGE_FORMATS`, ``"lowrank"``, or ``"none"``.
        tensors: one record per parameter.
        cache: scratch that a backend keeps between steps (pointers, chunks, descriptors), keyed by the backend.
    """

    param_format: str
    state_format: str
    global_format: str
    tensors: list[ParamTensors]
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].param.device

    def all(self, part: str) -> list[Any]:
        """This part of every parameter, in order; empty where the formats have no such part."""
        return [found for tensor in self.tensors if (found := getattr(tensor, part)) is not None]

"""The optimizers under study, written for reading and for variants, not for speed.

``StudyAdamW`` is AdamW with every member of the family behind a field of :class:`Setting`; weight decay is 0 throughout
the study. It shares no code with the library: that the plain DBA rows agree with ``dba_kernels.DBAAdamW`` is a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality.memory import Anchor
from bench.quality.setting import Setting

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Named = dict[str, Tensor]


@dataclass
class GeneralStatistics:
    """What the zero-learning-rate pass keeps, per parameter: mean and second moment of the batch gradients.

    ``tokens`` is the number of predicted tokens per batch: the Fisher estimate is N·Var(g).
    """

    mean: Named
    second_moment: Named
    tokens: int
    seconds: float = 0.0  # what the pass took

    def fisher(self, name: str) -> Tensor:
        """Diagonal of the empirical Fisher matrix, per token: N·(E[g²] − E[g]²), never negative."""
        return (self.second_moment[name] - self.mean[name] ** 2).clamp_(min=0) * self.tokens

    def shrink(self, batches: int) -> None:
        """Scale the mean of ``batches`` gradients by s per tensor (eq. 13): what its noise leaves of it."""
        for name, mean in self.mean.items():
            noise = (self.second_moment[name] - mean**2).sum().item() / (batches - 1)
            mean.mul_(max(0.0, 1 - noise / max(mean.square().sum().item(), 1e-30)))


def gamma(setting: Setting, step: int) -> float:
    """Eq. 2 with k₀ = ``setting.boost``, clamped to [0, boost_max]."""
    return min(max(setting.boost * (1 - step / setting.steps), 0.0), setting.boost_max)  # eq. 2


def similarity(dot: float, grad_sq: float, global_sq: float) -> float:
    """Eq. 4: the cosine of the two gradients, 0 where either vanishes."""
    return dot / (grad_sq * global_sq) ** 0.5 if grad_sq > 0 and global_sq > 0 else 0.0  # eq. 4


class StudyAdamW:
    """Adam on ``a·g_D + b·ĝ_G + λ·H·δ``, its update scaled by α, with the pulls and the seeded v of the study."""

    def __init__(
        self,
        parameters: Named,
        setting: Setting,
        general: GeneralStatistics | None,
        anchor: Anchor | None = None,
    ) -> None:
        if general is None and setting.needs_general():
            raise ValueError(f"{setting.method}: expected general statistics, got None; collect them first")
        self.parameters, self.setting, self.general, self.anchor = parameters, setting, general, anchor
        self.steps = 0
        self.exp_avg = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p) for n, p in parameters.items()}
        if setting.seed_v:
            self.exp_avg_sq = {n: self._general().second_moment[n].clone() for n in parameters}
        self.origin: Named = {}
        self.pull: Named = {}
        if setting.anchor > 0:
            self.origin = {n: p.detach().clone() for n, p in parameters.items()}
            self.pull = self._pull()
        self.last_cosine: dict[str, float] = {}
        self.cosines: list[float] = []

    def _general(self) -> GeneralStatistics:
        assert self.general is not None
        return self.general

    def _pull(self) -> Named:
        """c·F per element; a Fisher metric is scaled to mean 1 over the model, so that c means the same for all."""
        if self.setting.metric == "uniform":
            return {n: torch.full_like(p, self.setting.anchor) for n, p in self.parameters.items()}
        metric = {n: self._general().fisher(n) for n in self.parameters}
        if self.setting.metric == "root_fisher":
            metric = {n: f.sqrt_() for n, f in metric.items()}
        mean = sum(f.sum().item() for f in metric.values()) / sum(f.numel() for f in metric.values())
        return {n: f * (self.setting.anchor / mean) for n, f in metric.items()}

    def _similarities(self) -> dict[str, tuple[float, float, float]]:
        """⟨g_D, ĝ_G⟩, ‖g_D‖², ‖ĝ_G‖² per parameter, or the model's sums under every name."""
        sums = {}
        for name, parameter in self.parameters.items():
            grad, global_grad = parameter.grad.flatten(), self._general().mean[name].flatten()
            sums[name] = tuple(float(x) for x in (grad @ global_grad, grad @ grad, global_grad @ global_grad))
        if self.setting.scope == "global":
            total = tuple(sum(column) for column in zip(*sums.values(), strict=True))
            return dict.fromkeys(sums, total)
        return sums

    def _coefficients(self) -> dict[str, tuple[float, float, float]]:
        """(a, b, α) per parameter: the family's table."""
        s, boost = self.setting, gamma(self.setting, self.steps)
        if s.correction == "none":
            a, b = (1.0, 0.0) if s.boost_of == "update" else (1 - boost, boost)
            return dict.fromkeys(self.parameters, (a, b, 1.0))
        coefficients = {}
        for name, (dot, grad_sq, global_sq) in self._similarities().items():
            cosine = similarity(dot, grad_sq, global_sq)
            self.cosines.append(cosine)
            conflict = min(dot, 0.0)
            if s.correction == "agem":
                coefficients[name] = (1.0, -conflict / max(global_sq, 1e-30), 1.0)
            elif s.correction == "pcgrad":
                coefficients[name] = (1 - conflict / max(grad_sq, 1e-30), 1 - conflict / max(global_sq, 1e-30), 1.0)
            else:
                used = self.last_cosine.get(name, 0.0) if s.lagged else cosine
                self.last_cosine[name] = cosine
                alpha = min(max(1 - used, s.lower), s.upper)  # eq. 5
                a, b = (1.0, 0.0) if s.boost_of == "update" else (1 - boost, boost)
                coefficients[name] = (a, b, alpha)
        return coefficients

    @torch.no_grad()
    def step(self) -> None:
        """One update; gradients are consumed."""
        s = self.setting
        lr = s.lr * (1 - self.steps / s.steps) if s.anneal else s.lr  # eq. 6
        coefficients = self._coefficients()
        correction1 = 1 - BETA1 ** (self.steps + 1)
        correction2 = 1.0 if s.seed_v else 1 - BETA2 ** (self.steps + 1)
        updates, scales = {}, {}
        for name, parameter in self.parameters.items():
            a, b, alpha = coefficients[name]
            grad = parameter.grad
            if a != 1:
                grad.mul_(a)
            if b != 0:
                grad.add_(self._general().mean[name], alpha=b)  # eq. 3
            if s.anchor > 0 and s.anchor_of == "gradient":
                grad.addcmul_(self.pull[name], parameter - self.origin[name])
            exp_avg, exp_avg_sq = self.exp_avg[name], self.exp_avg_sq[name]
            if self.anchor is not None and s.memory_form != "implicit":
                anchored = grad + self.anchor.gradient(name, parameter, self.steps)  # eq. 10
                exp_avg.lerp_(anchored, 1 - BETA1)  # eq. 7
                grad = grad if s.memory_form == "momentum" else anchored
            else:
                exp_avg.lerp_(grad, 1 - BETA1)  # eq. 7
            exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            denominator = (exp_avg_sq / correction2).sqrt_().add_(EPS)
            updates[name] = (exp_avg / correction1).div_(denominator)
            scales[name] = alpha
            if s.boost_of == "update":
                self._boost_update(name, updates[name], denominator)
            parameter.grad = None
        for name, parameter in self.parameters.items():
            parameter.add_(updates[name], alpha=-lr * scales[name])  # eq. 8
            if s.anchor > 0 and s.anchor_of == "decoupled":
                # Implicit step of the pull: its strength follows η_0, not the decaying rate.
                strength = s.lr * self.pull[name]
                parameter.add_(strength * self.origin[name]).div_(1 + strength)
            if self.anchor is not None and s.memory_form == "implicit":
                # Preconditioned like the update, but by one number per tensor: H keeps its eigenvectors.
                mean = (self.exp_avg_sq[name] / correction2).sqrt_().mean().item() + EPS
                self.anchor.pull(name, parameter, lr * self.anchor.weight / mean)
        self.steps += 1

    def _boost_update(self, name: str, update: Tensor, denominator: Tensor) -> None:
        """Mix in ĝ_G/(√v̂+ε), scaled to the update's own norm: γ is then the boost's share of the step."""
        boost = gamma(self.setting, self.steps)
        direction = self._general().mean[name] / denominator
        scale = boost * float(update.norm()) / max(float(direction.norm()), 1e-30)
        update.mul_(1 - boost).add_(direction, alpha=scale)


class GaLoreAdamW:
    """Adam in a gradient subspace, after Zhao et al. 2024: the ``rank`` leading singular vectors of the gradient.

    They come from a fresh factorisation every ``interval`` steps, on the shorter side of each matrix; vectors are
    updated in full. The published scale factor is left to the learning rate.
    """

    def __init__(self, parameters: Named, setting: Setting, interval: int = 64) -> None:
        self.parameters, self.setting, self.interval, self.steps = parameters, setting, interval, 0
        self.basis: Named = {}
        self.exp_avg: Named = {}
        self.exp_avg_sq: Named = {}

    def _project(self, name: str, grad: Tensor) -> Tensor:
        """The gradient in its basis: ``[rank, long side]``."""
        tall = grad if grad.shape[0] <= grad.shape[1] else grad.T
        if self.steps % self.interval == 0:
            self.basis[name] = torch.linalg.eigh(tall @ tall.T).eigenvectors[:, -self.setting.galore_rank :]
        return self.basis[name].T @ tall

    @torch.no_grad()
    def step(self) -> None:
        """One update; gradients are consumed."""
        s = self.setting
        lr = s.lr * (1 - self.steps / s.steps) if s.anneal else s.lr
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            low = self._project(name, grad) if grad.ndim == 2 else grad
            exp_avg = self.exp_avg.setdefault(name, torch.zeros_like(low))
            exp_avg_sq = self.exp_avg_sq.setdefault(name, torch.zeros_like(low))
            exp_avg.lerp_(low, 1 - BETA1)
            exp_avg_sq.mul_(BETA2).addcmul_(low, low, value=1 - BETA2)
            denominator = (exp_avg_sq / (1 - BETA2 ** (self.steps + 1))).sqrt_().add_(EPS)
            update = (exp_avg / (1 - BETA1 ** (self.steps + 1))).div_(denominator)
            if grad.ndim == 2:
                update = self.basis[name] @ update
                update = update if grad.shape[0] <= grad.shape[1] else update.T
            parameter.add_(update, alpha=-lr)
            parameter.grad = None
        self.steps += 1

"""A float64 oracle of the whole method, in plain numpy, that shares nothing with the reference.

It works on vectors where the reference works on sums, takes the moments as weighted sums of the whole history where the
reference keeps a recurrence, and 1 − β^k where the reference keeps an EMA of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

STEPS, TOTAL_STEPS = 14, 10  # two steps are skipped, so the last two are beyond T, where γ is 0
SHAPES = {"a": (3, 5), "plain": (4,), "b": (7,), "c": (2, 3, 2)}  # "plain" has no global gradient
NAMES = list(SHAPES)
GROUP_OF = {"a": 0, "plain": 1, "b": 1, "c": 0}
GROUPS = (
    {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.0},
)
MISSING = {(2, "b"), (3, "b"), (0, "c")}  # steps at which a parameter has no gradient
NAN_STEP, FOUND_INF_STEP, ZERO_STEP = 4, 6, 8


@dataclass(frozen=True)
class Case:
    """What one run is made with; every field but ``dtype`` means the same to the oracle and to the reference."""

    correction: str = "cosine"
    scope: str = "tensor"
    max_grad_norm: float | None = None
    maximize: bool = False
    loss_scale: float | None = None
    bounds: tuple[float, float] = (0.0, 2.0)
    boost: float = 0.9  # above boost_max, so that the clamp acts at first
    boost_max: float = 0.5
    gamma: float | None = None
    alphas: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float64


BUSY = Case(max_grad_norm=2.0, loss_scale=8.0)
"""Everything acts at once: clipping, loss scale, boost, correction, decay, missing and skipped steps."""


@dataclass
class State:
    """What is compared after every step."""

    params: dict[str, np.ndarray]
    exp_avgs: dict[str, np.ndarray]
    exp_avg_sqs: dict[str, np.ndarray]
    steps: dict[str, int]
    bias_corrections: dict[str, tuple[float, float]]
    done: int
    skipped: int
    report: dict[str, tuple[float, float]] = field(default_factory=dict)  # φ, α of the parameters updated in this step
    summary: tuple[float, ...] = ()  # γ, clip factor, ‖g_D‖, ‖ĝ_G‖ over the parameters of this step; empty if skipped


def start() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and global gradients; every value is an fp32 number, so that fp32 storage keeps it."""
    random = np.random.default_rng(0)
    params = {name: random.normal(size=shape).astype(np.float32).astype(float) for name, shape in SHAPES.items()}
    stored = {name: random.normal(size=shape).astype(np.float32).astype(float) for name, shape in SHAPES.items()}
    del stored["plain"]
    return params, stored


def gradients(case: Case, t: int) -> dict[str, np.ndarray]:
    """Domain gradients of step t as autograd hands them over (scaled), agreeing and conflicting with ĝ_G in turn."""
    random = np.random.default_rng(100 + t)
    _, stored = start()
    lean = (0.8, -0.7, -0.2, 0.3)[t % 4]
    grads = {}
    for name, shape in SHAPES.items():
        noise = random.normal(size=shape)
        grad = (noise + lean * stored.get(name, 0.0)) * (case.loss_scale or 1.0)
        if (t, name) not in MISSING:
            grads[name] = np.asarray(grad).astype(np.float32).astype(float)
    if t == ZERO_STEP:
        grads["a"] = np.zeros(SHAPES["a"])
    if t == NAN_STEP:
        grads["c"][1, 2, 0] = np.nan
    return grads


def rates(t: int) -> list[float]:
    """η_t of each group: eq. 6 by calls, as a scheduler counts them, and not all the way to 0."""
    return [group["lr"] * (1 - t / 20) for group in GROUPS]


def joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.ravel() for part in parts])


def cosine_of(x: np.ndarray, y: np.ndarray) -> float:
    """eq. 4 by polarisation of the unit vectors: (‖u+w‖² − ‖u−w‖²)/4."""
    length_x, length_y = math.hypot(*x), math.hypot(*y)
    if length_x == 0 or length_y == 0:
        return 0.0
    u, w = x / length_x, y / length_y
    return (math.fsum((u + w) ** 2) - math.fsum((u - w) ** 2)) / 4


def without_component(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x projected onto the plane normal to y."""
    return x - y * (np.dot(x, y) / np.dot(y, y)) if np.dot(y, y) > 0 else x


def combine(case: Case, gamma: float, grad: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """g_B of eq. 3, or the projections as their papers state them, on vectors."""
    if case.correction not in ("agem", "pcgrad"):
        return gamma * stored + (1 - gamma) * grad
    conflict = np.dot(grad, stored) < 0
    projected = without_component(grad, stored) if conflict else grad
    if case.correction == "agem":
        return projected
    return projected + (without_component(stored, grad) if conflict else stored)


def oracle(case: Case) -> list[State]:
    params, stored = start()
    history: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    done = skipped = 0
    states = []
    for t in range(STEPS):
        sign = -1.0 if case.maximize else 1.0
        grads = {name: sign * grad / (case.loss_scale or 1.0) for name, grad in gradients(case, t).items()}
        report, summary = {}, ()
        if t == FOUND_INF_STEP or not all(np.isfinite(grad).all() for grad in grads.values()):
            skipped += 1
        else:
            norm = math.hypot(*joined(list(grads.values())))
            clip = 1.0 if case.max_grad_norm is None else min(1.0, case.max_grad_norm / (norm + 1e-6))
            grads = {name: clip * grad for name, grad in grads.items()}
            gamma = case.gamma
            if gamma is None:
                gamma = min(max(case.boost * (TOTAL_STEPS - done) / TOTAL_STEPS, 0.0), case.boost_max)
            with_global = [name for name in grads if name in stored]
            summary = (gamma, clip, norm, math.hypot(*joined([stored[name] for name in with_global])))
            for i, name in enumerate(NAMES):
                if name not in grads:
                    continue
                boosted, phi, alpha = grads[name], 0.0, 1.0
                if name in stored:
                    over = with_global if case.scope == "global" else [name]
                    g, h = joined([grads[n] for n in over]), joined([stored[n] for n in over])
                    at = sum(grads[n].size for n in over[: over.index(name)])
                    boosted = combine(case, gamma, g, h)[at : at + grads[name].size].reshape(SHAPES[name])
                    phi = cosine_of(g, h)
                    if case.alphas is not None:
                        alpha = case.alphas[i]
                    elif case.correction == "cosine":
                        alpha = min(max(1 - phi, case.bounds[0]), case.bounds[1])
                report[name] = (phi, alpha)
                history[name].append(boosted)
                group, lr = GROUPS[GROUP_OF[name]], rates(t)[GROUP_OF[name]]
                m, v = (np.array(x) for x in moments_of(history[name], group["betas"]))
                k = len(history[name])
                m_hat, v_hat = m / (1 - group["betas"][0] ** k), v / (1 - group["betas"][1] ** k)
                decayed = params[name] * (1 - lr * group["weight_decay"])
                params[name] = decayed - lr * alpha * m_hat / (np.sqrt(v_hat) + group["eps"])
            done += 1
        all_moments = {n: moments_of(history[n], GROUPS[GROUP_OF[n]]["betas"], SHAPES[n]) for n in NAMES}
        steps = {name: len(history[name]) for name in NAMES}
        states.append(
            State(
                params=dict(params),
                exp_avgs={name: all_moments[name][0] for name in NAMES},
                exp_avg_sqs={name: all_moments[name][1] for name in NAMES},
                steps=steps,
                bias_corrections={
                    n: tuple(1 - beta ** steps[n] for beta in GROUPS[GROUP_OF[n]]["betas"]) for n in NAMES
                },
                done=done,
                skipped=skipped,
                report=report,
                summary=summary,
            )
        )
    return states


def moments_of(
    history: list[np.ndarray], betas: tuple[float, float], shape: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """eq. 7 unrolled: (1−β) Σ_i β^(k−i) g_i, and the same of g_i²."""
    m, v = np.zeros(shape), np.zeros(shape)
    for age, grad in enumerate(reversed(history)):
        m = m + (1 - betas[0]) * betas[0] ** age * grad
        v = v + (1 - betas[1]) * betas[1] ** age * grad**2
    return m, v

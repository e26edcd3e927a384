"""GaLore (Zhao et al. 2024) on matrices, AdamW on the rest: a memory-saving rival with torch's interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class GaLore(torch.optim.Optimizer):
    """Adam in the span of the gradient's ``rank`` leading singular vectors, found anew every ``interval`` steps.

    The projection is on the shorter side of each matrix. The published scale factor is left to the learning rate.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, rank: int, interval: int = 64) -> None:
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.999), eps=1e-8))
        self.rank, self.interval = rank, interval

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                done = state.get("step", 0)
                wide = param.grad.dim() == 2 and param.shape[0] <= param.shape[1]
                grad = param.grad if param.dim() != 2 or wide else param.grad.T
                if param.dim() == 2:
                    if done % self.interval == 0:
                        state["basis"] = torch.linalg.eigh(grad @ grad.T).eigenvectors[:, -self.rank :]
                    grad = state["basis"].T @ grad  # [rank, long side]
                if not done:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["step"] = done = done + 1
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt_().add_(group["eps"])
                update = (state["exp_avg"] / (1 - beta1**done)).div_(denominator)
                if param.dim() == 2:
                    update = state["basis"] @ update
                    update = update if wide else update.T
                param.add_(update, alpha=-group["lr"])

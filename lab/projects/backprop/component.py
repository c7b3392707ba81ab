"""Project 4: AdamW, the learning-rate schedule and gradient clipping.

Kingma and Ba, 2015 (Adam); Loshchilov and Hutter, 2019 (decoupled decay); Pascanu et al., 2013 (clipping).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class AdamW(Optimizer):
    """Adam with bias correction and decoupled weight decay, over all tensors at once (foreach).

    Args:
        params: Parameters, or groups of them.
        lr, betas, eps, weight_decay: As in Loshchilov and Hutter, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        grads = [p.grad for p in params if p.grad is not None]
        means, squares = [], []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            means.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
        torch._foreach_lerp_(means, grads, 1 - b1)  # m <- b1 m + (1 - b1) g
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - b2)  # v <- b2 v + (1 - b2) g^2
        steps = [self.state[p]["step"] for p in params]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - b2**t) for t in steps])  # sqrt(v / (1 - b2^t))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, means, roots, [-lr / (1 - b1**t) for t in steps])


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.1) -> float:
    """Linear warmup, then half a cosine down to ``floor * peak`` (Loshchilov and Hutter, 2017).

    Args:
        step: From 0; the first step of a warmup already moves.
        peak: The highest rate.
        warmup: Steps until it is reached.
        total: Steps in all; the last is ``total - 1``.
        floor: The rate at the last step as a share of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients together so that their joint norm is at most `limit`; return the norm [] before that."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    # Without a branch on the norm, which would wait for the device.
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm

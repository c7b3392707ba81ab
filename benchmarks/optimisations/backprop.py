"""AdamW by one kernel call for all tensors (foreach), against a loop over parameters that writes the formula out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lab.projects.backprop.component import AdamW

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TENSORS, NUMBERS = 1000, 64


class Naive:
    """The formula, one parameter at a time, with a new tensor for every term."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.t = params, 0
        self.means = [torch.zeros_like(p) for p in params]
        self.squares = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr: float = 1e-3, b1: float = 0.9, b2: float = 0.95, decay: float = 0.1) -> None:
        """Update every parameter."""
        self.t += 1
        for i, p in enumerate(self.params):
            assert p.grad is not None
            self.means[i] = b1 * self.means[i] + (1 - b1) * p.grad
            self.squares[i] = b2 * self.squares[i] + (1 - b2) * p.grad * p.grad
            root = self.squares[i].sqrt() / math.sqrt(1 - b2**self.t) + 1e-8
            p.copy_(p * (1 - lr * decay) - lr / (1 - b1**self.t) * self.means[i] / root)


def parameters() -> list[Tensor]:
    """Return the same parameters each time, with gradients."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(NUMBERS, generator=draw) for _ in range(TENSORS)]
    for p in made:
        p.grad = torch.randn(NUMBERS, generator=draw)
    return made


def variants() -> dict[str, Callable[[], object]]:
    """One step on 1000 parameters of 64 numbers; the first is the one to beat."""
    return {"one parameter at a time": Naive(parameters()).step, "foreach": AdamW(parameters()).step}

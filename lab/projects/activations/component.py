"""Project 2: activations, and the feed-forward layer that they make non-linear.

GELU: Hendrycks and Gimpel, 2016.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.projects.linear.component import Linear
from lab.sites import Component


def gelu_explicit(x: Tensor) -> Tensor:
    """``x Phi(x)``, with Phi the distribution function of the standard normal."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu(x: Tensor) -> Tensor:
    """Compute `gelu_explicit` by the fused kernel: one pass over memory in place of four."""
    return F.gelu(x)


class FeedForward(Component):
    """Widen, apply GELU, narrow: what each position computes on its own.

    Args:
        width, hidden: C and F.
        gain: Of the second linear layer, whose output is added to the residual stream.
    """

    SITES = MappingProxyType({"hidden": "B T F", "out": "B T C"})

    def __init__(self, width: int, hidden: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """``down(gelu(up(x)))``."""
        hidden = self.tap("hidden", gelu(self.up(x)))  # [B T F]
        return self.tap("out", self.down(hidden))  # [B T C]

"""Project 2: activations, and the feed-forward layer that they make non-linear.

GELU: Hendrycks and Gimpel, 2016.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.errors import BadInput, nearest
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Callable


def gelu_explicit(x: Tensor) -> Tensor:
    """``x Phi(x)``, with Phi the distribution function of the standard normal."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu(x: Tensor) -> Tensor:
    """Compute `gelu_explicit` by the fused kernel: one pass over memory in place of four."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with Phi approximated by a hyperbolic tangent, as GPT-2 has it; within 4.8e-4 of `gelu`."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"gelu": gelu, "gelu-tanh": gelu_tanh, "relu": torch.relu, "silu": F.silu, "sigmoid": torch.sigmoid}
)


class FeedForward(Component):
    """Widen, apply an activation, narrow: what each position computes on its own.

    Args:
        width, hidden: C and F.
        activation: A name of `ACTIVATIONS`.
        gain: Of the second linear layer, whose output is added to the residual stream.

    Raises:
        BadInput: There is no such activation.
    """

    SITES = MappingProxyType({"hidden": "B T F", "out": "B T C"})

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu", gain: float = 1.0) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise BadInput(f"model.activation: found {activation!r}{nearest(activation, ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """``down(activation(up(x)))``."""
        hidden = self.tap("hidden", self.activation(self.up(x)))  # [B T F]
        return self.tap("out", self.down(hidden))  # [B T C]


class GatedFeedForward(Component):
    """SwiGLU (Shazeer, 2020): one projection, through SiLU, decides how much of another passes. No biases.

    Args:
        width, hidden: C and F.
        gain: Of the last linear layer, whose output is added to the residual stream.
    """

    SITES = MappingProxyType({"gate": "B T F", "hidden": "B T F", "out": "B T C"})

    def __init__(self, width: int, hidden: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """``down(silu(gate(x)) * up(x))``."""
        gate = self.tap("gate", F.silu(self.gate(x)))
        hidden = self.tap("hidden", gate * self.up(x))
        return self.tap("out", self.down(hidden))

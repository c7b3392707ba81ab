"""Project 2: activations, and the feed-forward layers that they make non-linear.

ReLU: Nair and Hinton, 2010. GELU: Hendrycks and Gimpel, 2016. SiLU: Elfwing et al., 2018. SwiGLU: Shazeer, 2020.

Each activation stands twice: by its formula, and by the fused kernel that trains, which reads and writes memory once.
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


def relu_explicit(x: Tensor) -> Tensor:
    """``max(x, 0)``, with gradient 0 at 0, where there is no derivative. NaN stays NaN."""
    return x.masked_fill(x <= 0, 0.0)


def relu(x: Tensor) -> Tensor:
    """Compute `relu_explicit` by the fused kernel."""
    return torch.relu(x)


def sigmoid_explicit(x: Tensor) -> Tensor:
    """``1 / (1 + e^-x)``, written so that no exponent is above 0: neither the value nor the gradient overflows."""
    negative = x < 0
    small = torch.where(negative, x, -x).exp()  # e^-|x|, at most 1; the gradient of |x| would be 0 at 0
    return torch.where(negative, small, 1.0) / (1.0 + small)


def sigmoid(x: Tensor) -> Tensor:
    """Compute `sigmoid_explicit` by the fused kernel."""
    return torch.sigmoid(x)


def silu_explicit(x: Tensor) -> Tensor:
    """``x sigmoid(x)``, also called swish."""
    return x * sigmoid_explicit(x)


def silu(x: Tensor) -> Tensor:
    """Compute `silu_explicit` by the fused kernel."""
    return F.silu(x)


def gelu_explicit(x: Tensor) -> Tensor:
    """``x Phi(x)``, with Phi the distribution function of the standard normal."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu(x: Tensor) -> Tensor:
    """Compute `gelu_explicit` by the fused kernel: one pass over memory in place of five."""
    return F.gelu(x)


def gelu_tanh_explicit(x: Tensor) -> Tensor:
    """GELU with Phi approximated by a hyperbolic tangent, as GPT-2 has it; within 4.8e-4 of `gelu`."""
    near = x.clamp(-10.0, 10.0)  # beyond, the tangent is 1 to the last bit of float64, and a cube might overflow
    inner = math.sqrt(2.0 / math.pi) * (near + 0.044715 * near * near * near)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute `gelu_tanh_explicit` by the fused kernel, whose gradient is NaN where the square of x overflows."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": relu, "gelu": gelu, "gelu-tanh": gelu_tanh, "silu": silu, "sigmoid": sigmoid}
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
        width, hidden: C and F; the parameters are 3 C F.
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
        gate = self.tap("gate", silu(self.gate(x)))  # [B T F]
        hidden = self.tap("hidden", gate * self.up(x))  # [B T F]
        return self.tap("out", self.down(hidden))  # [B T C]

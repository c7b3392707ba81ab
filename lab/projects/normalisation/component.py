"""Project 12: layer normalisation (Ba, Kiros and Hinton, 2016) and RMS normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.sites import Component


class LayerNorm(Component):
    """Each position to mean 0 and variance 1 over its width, then scaled by a gain and shifted by a bias."""

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def explicit(self, x: Tensor) -> Tensor:  # [... C] -> [... C]
        """The formula. The variance is the biased one, and eps stands inside the root."""
        mean = x.mean(dim=-1, keepdim=True)  # [... 1]
        variance = (x - mean).square().mean(dim=-1, keepdim=True)  # [... 1]
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias

    def forward(self, x: Tensor) -> Tensor:  # [... C] -> [... C]
        """The same by the fused kernel, in one pass over memory."""
        return self.tap("out", F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps))


class RMSNorm(Component):
    """Each position to root mean square 1 over its width, then scaled by a gain: no mean is subtracted, no bias added.

    The explicit path squares in the dtype it is given: in float16 it overflows from 256 on. The fused path does not.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def explicit(self, x: Tensor) -> Tensor:  # [... C] -> [... C]
        """The formula. Eps stands inside the root."""
        mean_square = x.square().mean(dim=-1, keepdim=True)  # [... 1]
        return x * (mean_square + self.eps).rsqrt() * self.weight

    def forward(self, x: Tensor) -> Tensor:  # [... C] -> [... C]
        """The same by the fused operator, in float32 where the input is of half precision."""
        # 256 squared is already inf in float16; rsqrt then gives 0, and the whole row silently becomes 0.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # [... C]
        out = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)  # [... C]
        return self.tap("out", out.to(x.dtype))

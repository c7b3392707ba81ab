"""Project 1: the linear layer and its initialisers.

Glorot and Bengio, 2010 (initialisation); He et al., 2015 (its version for ReLU).
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lab.sites import Component


def he_std(inputs: int) -> float:
    """Return the standard deviation that keeps the mean square through a layer and a ReLU, which halves it."""
    return math.sqrt(2.0 / inputs)


def glorot_std(inputs: int, outputs: int) -> float:
    """Return the standard deviation between what keeps outputs (``1/inputs``) and gradients (``1/outputs``)."""
    return math.sqrt(2.0 / (inputs + outputs))


class Linear(Component):
    """``y = x W^T + b``: a vector of width `inputs` becomes one of width `outputs`.

    Args:
        inputs, outputs: The widths.
        bias: Whether to add one.
        gain: The weights are normal with standard deviation ``gain / sqrt(inputs)``, so that outputs have
            ``gain^2`` times the mean square of the inputs.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=gain * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [... inputs] -> [... outputs]
        """Multiply and add. One fused `addmm` over all positions at once."""
        rows = x.reshape(-1, x.shape[-1])  # [N inputs]
        weight = self.weight.t()  # [inputs outputs]
        y = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)  # [N outputs]
        return self.tap("out", y.view(*x.shape[:-1], len(self.weight)))

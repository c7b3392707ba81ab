"""Project 13: the residual block (He et al., 2016), normalised before each branch (Xiong et al., 2020)."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from lab.projects.activations.component import FeedForward
from lab.projects.multihead.component import MultiHeadAttention
from lab.projects.normalisation.component import LayerNorm
from lab.sites import Component

if TYPE_CHECKING:
    from torch import Tensor


class Block(Component):
    """Two branches, each added to the stream that passes by: one mixes positions, one computes at each position.

    Args:
        width, heads: C and H.
        layers: How many blocks the stream passes. Each branch ends in a gain of ``1 / sqrt(2 layers)``, so that the
            variance of 2 x layers sums does not grow with depth (Radford et al., 2019, section 2.3).
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        gain = (2 * layers) ** -0.5
        self.attn_norm = LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, gain=gain)
        self.mlp_norm = LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """Add what each branch makes of the stream."""
        x = x + self.attn(self.attn_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return self.tap("out", x)

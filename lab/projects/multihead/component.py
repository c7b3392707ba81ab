"""Project 8: multi-head attention (Vaswani et al., 2017, section 3.2.2)."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from lab.errors import BadInput
from lab.projects.attention.component import Attention
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from torch import Tensor


class MultiHeadAttention(Component):
    """Several attentions side by side, each in a slice of the width, joined by an output projection.

    Args:
        width: C, a multiple of `heads`.
        heads: H; each has width D = C / H.
        gain: Of the output projection, whose output is added to the residual stream.

    Raises:
        BadInput: `width` is no multiple of `heads`.
    """

    SITES = MappingProxyType({"q": "B H T D", "k": "B H T D", "v": "B H T D", "out": "B T C"})

    def __init__(self, width: int, heads: int, *, gain: float = 1.0) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"model.width = {width} is no multiple of model.heads = {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.core = Attention()
        self.proj = Linear(width, width, gain=gain)

    def split(self, x: Tensor) -> Tensor:  # [B T C] -> [B H T D]
        """Give each head its slice of the width."""
        b, t, c = x.shape
        return x.view(b, t, self.heads, c // self.heads).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:  # [B H T D] -> [B T C]
        """Put the slices side by side again."""
        b, h, t, d = x.shape
        return x.transpose(1, 2).reshape(b, t, h * d)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """Project, split, attend, merge, project."""
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))  # [B H T D] each
        mixed = self.core(self.tap("q", q), self.tap("k", k), self.tap("v", v))  # [B H T D]
        return self.tap("out", self.proj(self.merge(mixed)))  # [B T C]

"""Project 8: multi-head attention (Vaswani et al., 2017, section 3.2.2); grouped queries (Ainslie et al., 2023)."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from lab.errors import BadInput
from lab.projects.attention.component import Attention
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Memory(Protocol):
    """The keys and values of the positions before, of one layer (project 14)."""

    @property
    def length(self) -> int:
        """How many positions it holds."""
        ...

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B K T D]; return all, [B K S D]."""
        ...


class MultiHeadAttention(Component):
    """Several attentions side by side, each in a slice of the width, joined by an output projection.

    Args:
        width: C, a multiple of `heads`.
        heads: H; each has width D = C / H.
        kv_heads: K, of keys and values; each serves H / K heads of queries. H if None.
        gain: Of the output projection, whose output is added to the residual stream.
        turn: What a position does to queries and keys, ``turn(x [B H T D], start)``: a rotation (project 11).
        bias: What distance adds to the scores, ``bias(H, T, S) -> [H T S]`` (project 11).

    Raises:
        BadInput: `width` is no multiple of `heads`, or `heads` none of `kv_heads`.
    """

    SITES = MappingProxyType({"q": "B H T D", "k": "B H T D", "v": "B H T D", "out": "B T C"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        gain: float = 1.0,
        turn: Callable[[Tensor, int], Tensor] | None = None,
        bias: Callable[[int, int, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"model.width = {width} is no multiple of model.heads = {heads}")
        self.heads, self.kv_heads = heads, kv_heads or heads
        if heads % self.kv_heads:
            raise BadInput(f"model.heads = {heads} is no multiple of model.kv_heads = {kv_heads}")
        self.each = width // heads  # D
        self.turn, self.bias = turn, bias
        self.qkv = Linear(width, width + 2 * self.kv_heads * self.each)
        self.core = Attention()
        self.proj = Linear(width, width, gain=gain)

    def split(self, x: Tensor) -> Tensor:  # [B T H*D] -> [B H T D]
        """Give each head its slice of the width."""
        b, t, c = x.shape
        return x.view(b, t, c // self.each, self.each).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:  # [B H T D] -> [B T C]
        """Put the slices side by side again."""
        b, h, t, d = x.shape
        return x.transpose(1, 2).reshape(b, t, h * d)

    def shared(self, x: Tensor) -> Tensor:  # [B K S D] -> [B H S D]
        """Let each head of keys or values serve its group of queries."""
        return x if self.kv_heads == self.heads else x.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # [B T C] -> [B T C]
        """Project, split, attend, merge, project. With a memory, `x` holds the positions that follow it."""
        parts = self.qkv(x).split([x.shape[-1], *[self.kv_heads * self.each] * 2], dim=-1)  # [B T C], [B T K*D] x 2
        q, k, v = (self.split(part) for part in parts)  # [B H T D], [B K T D] x 2
        if self.turn is not None:
            start = 0 if memory is None else memory.length
            q, k = self.turn(q, start), self.turn(k, start)
        q, k, v = self.tap("q", q), self.tap("k", k), self.tap("v", v)
        if memory is not None:
            k, v = memory.extend(k, v)  # [B K S D]
        bias = None if self.bias is None else self.bias(self.heads, q.shape[2], k.shape[2]).to(q)  # [H T S]
        mixed = self.core(q, self.shared(k), self.shared(v), bias)  # [B H T D]
        return self.tap("out", self.proj(self.merge(mixed)))  # [B T C]

"""Project 11: what tells a position from another. And the embedding of tokens, to which it is added."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import BadInput
from lab.sites import Component


class Embedding(Component):
    """A row of a table for each token. The same as a linear layer on one-hot vectors, without the multiplication."""

    SITES = MappingProxyType({"out": "B T C"})
    fan_in = 1

    def __init__(self, count: int, width: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:  # [B T] -> [B T C]
        """Look up."""
        return self.tap("out", F.embedding(tokens, self.weight))


class LearnedPositions(Component):
    """A learned row for each position (Gehring et al., 2017), up to `context` of them."""

    SITES = MappingProxyType({"out": "T C"})
    fan_in = 1

    def __init__(self, context: int, width: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, length: int, start: int = 0) -> Tensor:  # -> [T C]
        """The rows of `length` positions from `start` on.

        Raises:
            BadInput: There are not that many.
        """
        return self.tap("out", _rows(self.weight, length, start))


class SinusoidalPositions(Component):
    """Sines and cosines of each position, at wavelengths from 2 pi to 10000 x 2 pi (Vaswani et al., 2017, 3.5)."""

    SITES = MappingProxyType({"out": "T C"})
    table: Tensor

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        places = torch.arange(context, dtype=torch.float64)[:, None]  # [T 1]
        rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # [C/2]
        table = torch.stack([(places * rates).sin(), (places * rates).cos()], dim=-1).flatten(1)[:, :width]  # [T C]
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, length: int, start: int = 0) -> Tensor:  # -> [T C]
        """The rows of `length` positions from `start` on; see `LearnedPositions`."""
        return self.tap("out", _rows(self.table, length, start))


def _rows(table: Tensor, length: int, start: int) -> Tensor:  # [context C] -> [T C]
    if start + length > len(table):
        raise BadInput(f"{start + length} tokens, but the model has positions for {len(table)} (model.context)")
    return table[start : start + length]


def rotate(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:  # [B H T D] -> [B H T D]
    """Turn each pair of channels by an angle that grows with the position (Su et al., 2021).

    Raises:
        BadInput: D is odd.
    """
    length, width = x.shape[-2:]
    if width % 2:
        raise BadInput(f"a head of width {width} cannot be turned in pairs: model.width / model.heads must be even")
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)  # [D/2]
    angles = torch.arange(start, start + length, device=x.device, dtype=torch.float32)[:, None] * rates  # [T D/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)  # [B H T D/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def alibi_bias(heads: int, queries: int, keys: int) -> Tensor:  # -> [H T S]
    """Each head's penalty on distance, ``-2^(-8 h / H) (t - s)`` (Press et al., 2022); the queries are the last."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)  # [H]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)  # [T S]
    return -slopes[:, None, None] * distance.clamp_min(0)

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
    """A sine and a cosine of each position for each of C/2 wavelengths (Vaswani et al., 2017, section 3.5).

    Channels 2i and 2i + 1 hold the sine and the cosine of ``t 10000^(-2i / C)``: wavelengths from 2 pi to nearly
    10000 x 2 pi. The table is no parameter and no part of the state dict. It is computed in float64 and kept in
    float32: the angle of position 8000 would be rounded by up to 0.0002 in float32.

    Args:
        context: The largest T.
        width: C. If it is odd, the last wavelength has its sine only.
    """

    SITES = MappingProxyType({"out": "T C"})
    table: Tensor

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        places = torch.arange(context, dtype=torch.float64)[:, None]  # [T 1]
        angles = places * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # [T C/2]
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]  # [T C]
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, length: int, start: int = 0) -> Tensor:  # -> [T C]
        """The rows of `length` positions from `start` on.

        Raises:
            BadInput: There are not that many.
        """
        return self.tap("out", _rows(self.table, length, start))


def _rows(table: Tensor, length: int, start: int) -> Tensor:  # [context C] -> [T C]
    if start + length > len(table):
        raise BadInput(f"{start + length} tokens, but the model has positions for {len(table)} (model.context)")
    return table[start : start + length]


def rotate(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:  # [B H T D] -> [B H T D]
    """Turn each pair of channels by an angle that grows with the position: RoPE (Su et al., 2021, section 3.2).

    Channel i < D/2 is paired with channel i + D/2, and turned by ``t base^(-2i / D)`` at position t. Angles and the
    turning itself are in float32, or in float64 where x is; the result has the dtype of x.

    Args:
        x: Queries or keys.
        start: The position of the first of them.
        base: The slowest pair takes nearly ``2 pi base`` positions to come round.

    Raises:
        BadInput: D is odd.
    """
    length, width = x.shape[-2:]
    if width % 2:
        raise BadInput(f"a head of width {width} cannot be turned in pairs: model.width / model.heads must be even")
    exact = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 641 numbers for the first 2048 positions
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=exact) / width)  # [D/2]
    angles = torch.arange(start, start + length, device=x.device, dtype=exact)[:, None] * rates  # [T D/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(exact).chunk(2, dim=-1)  # [B H T D/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def alibi_bias(heads: int, queries: int, keys: int) -> Tensor:  # -> [H T S]
    """What distance takes from the scores: ``-2^(-8 h / H) (t - s)`` in head h = 1 to H (Press et al., 2022).

    The queries are the last of the positions. Keys that are later than their query get 0: the mask hides them. The
    formula serves any number of heads; the authors' own program interpolates where H is no power of two.
    """
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)  # [H]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)  # [T S]
    return -slopes[:, None, None] * distance.clamp_min(0)

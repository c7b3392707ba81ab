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

    def forward(self, length: int) -> Tensor:  # -> [T C]
        """The rows of the first `length` positions.

        Raises:
            BadInput: There are not that many.
        """
        if length > len(self.weight):
            raise BadInput(f"{length} tokens, but the model has positions for {len(self.weight)} (model.context)")
        return self.tap("out", self.weight[:length])

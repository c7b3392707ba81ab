"""Tiled attention against all scores at once, 8 heads, 2048 causal positions: a tile fits into the cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lab.projects.parallel.component import tiled_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEADS, LENGTH, WIDTH = 8, 2048, 64


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula: [H T T] scores, their softmax, and the values."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    pattern: Tensor = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return pattern @ v


def variants() -> dict[str, Callable[[], object]]:
    """The forward pass without gradients; the first is the one to beat."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, WIDTH) for _ in range(3))
    return {
        "all scores": lambda: full(q, k, v),
        "tiles of 64": lambda: tiled_attention(q, k, v, tile=64),
        "tiles of 256": lambda: tiled_attention(q, k, v, tile=256),
    }

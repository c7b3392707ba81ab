"""Tiled attention against all scores at once: a tile fits into the cache, and tiles above the diagonal are skipped.

At T = 2048 and a tile of 64 the largest tensor has 1/32 of the numbers. For the backward pass (4 D + 1) T numbers a
head are kept, with D = 64 an eighth of one T x T array, in place of several such arrays.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from lab.projects.attention.component import Attention
from lab.projects.parallel.component import tiled_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 2 heads over 2048 causal positions of width 64; the first is the one to beat."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, 2, 2048, 64, requires_grad=True) for _ in range(3)]

    def run(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*qkv).sum(), qkv)

    tiled = {f"tiles of {tile}": run(functools.partial(tiled_attention, tile=tile)) for tile in (64, 256)}
    return {"all scores": run(Attention().explicit), **tiled}

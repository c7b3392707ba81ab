"""All heads in one product and one kernel against a loop over them: the same sums, in fewer and larger calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.projects.multihead.component import MultiHeadAttention

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, HEADS = 256, 8


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 8 sequences of 128 positions, 8 heads of width 32; the first is the one to beat."""
    torch.manual_seed(0)
    made, each = MultiHeadAttention(WIDTH, HEADS), WIDTH // HEADS
    weight, bias = made.qkv.weight, made.qkv.bias
    assert bias is not None
    x = torch.randn(8, 128, WIDTH, requires_grad=True)
    leaves = (x, *made.parameters())

    def loop(x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        mixed = []  # each [B T D]
        for h in range(HEADS):
            own = [slice(part * WIDTH + h * each, part * WIDTH + (h + 1) * each) for part in range(3)]
            q, k, v = (F.linear(x, weight[rows], bias[rows]) for rows in own)  # [B T D] each
            mixed.append(made.core(q[:, None], k[:, None], v[:, None])[:, 0])  # a batch of one head
        out: Tensor = made.proj(torch.cat(mixed, dim=-1))
        return out

    def attention_loop(x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        q, k, v = (made.split(part) for part in made.qkv(x).chunk(3, dim=-1))  # [B H T D] each
        one = [slice(h, h + 1) for h in range(HEADS)]
        mixed = [made.core(q[:, h], k[:, h], v[:, h]) for h in one]  # each [B 1 T D]
        out: Tensor = made.proj(made.merge(torch.cat(mixed, dim=1)))
        return out

    def run(path: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path(x).sum(), leaves)

    return {
        "a loop over heads": run(loop),
        "one projection, a loop over heads": run(attention_loop),
        "all heads at once": run(made),
    }

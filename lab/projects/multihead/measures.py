"""Numbers of multi-head attention that theory knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.projects.multihead.component import MultiHeadAttention
from lab.spec import measure, normal

WIDTH, HEADS, LENGTH = 32, 4, 16


def _layer(seed: int) -> MultiHeadAttention:
    """Build one from this seed, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiHeadAttention(WIDTH, HEADS)


def _influence(seed: int) -> Tensor:  # [T T]
    """Return the largest |d out_i / d x_j| over the channels of x_j: row i, column j."""
    made, x = _layer(seed).double(), normal(seed, 1, LENGTH, WIDTH).requires_grad_()
    out = made(x)  # [1 T C]
    rows = [torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().amax(-1) for i in range(LENGTH)]
    return torch.stack(rows)


@measure("weights over the square of the width, without biases; 4, whatever the number of heads")
def parameters_over_width_squared(seed: int) -> float:
    return sum(p.numel() for p in _layer(seed).parameters() if p.dim() == 2) / WIDTH**2


@measure("largest distance to nn.MultiheadAttention with the same weights, in float32; 0 but for rounding")
def torch_gap(seed: int) -> float:
    made = _layer(seed)
    with torch.random.fork_rng(devices=[]):  # its own start, drawn from torch's generator, is written over
        theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert made.qkv.bias is not None
    assert made.proj.bias is not None
    with torch.no_grad():
        made.qkv.bias.copy_(normal(seed + 1, 3 * WIDTH))  # those it starts with are 0 and would hide a wrong one
        made.proj.bias.copy_(normal(seed + 2, WIDTH))
        theirs.in_proj_weight.copy_(made.qkv.weight)
        theirs.in_proj_bias.copy_(made.qkv.bias)
        theirs.out_proj.weight.copy_(made.proj.weight)
        theirs.out_proj.bias.copy_(made.proj.bias)
        x = normal(seed, 2, LENGTH, WIDTH, dtype=torch.float32)
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)  # [T T], True where it may not look
        return float((made(x) - theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]).abs().max())


@measure("largest |d out_i / d x_j| for j > i; 0")
def future_gradient(seed: int) -> float:
    return float(_influence(seed).triu(1).max())


@measure("share of the pairs j <= i in which input j moves output i; 1")
def past_share(seed: int) -> float:
    past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()  # [T T]
    return float((_influence(seed)[past] > 0).double().mean())

"""Numbers of attention that theory knows."""

from __future__ import annotations

import torch

from lab.projects.attention.component import Attention
from lab.spec import measure, normal, tapped

WIDTH, LENGTH = 64, 64


def _captured(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    made = Attention()
    q, k, v = (normal(seed * 3 + i, 4, 4, LENGTH, WIDTH, dtype=torch.float32) for i in range(3))
    return tapped(made, scale * q, k, v, call=made.explicit)


@measure("standard deviation of the scores of unit-normal q and k; 1 with the scale 1/sqrt(D)")
def score_std(seed: int) -> float:
    return float(_captured(seed)["scores"].std())


@measure("the same without the scale; sqrt(D) = 8 at D = 64")
def score_std_unscaled(seed: int) -> float:
    return float(_captured(seed, WIDTH**0.5)["scores"].std())


def _last_row_entropy(seed: int, scale: float) -> float:
    row = _captured(seed, scale)["pattern"][..., -1, :].double()  # [B H S], over all 64 positions
    return float(-(row * row.clamp_min(1e-300).log()).sum(-1).mean())


@measure("entropy of a row over 64 positions, in nats; near ln 64 - 1/2 = 3.66, of at most ln 64 = 4.16")
def entropy(seed: int) -> float:
    return _last_row_entropy(seed, 1.0)


@measure("the same without the scale: attention has all but chosen one position")
def entropy_unscaled(seed: int) -> float:
    return _last_row_entropy(seed, WIDTH**0.5)


@measure("largest |d out_i / d v_j| for j > i; 0")
def future_gradient(seed: int) -> float:
    q, k, v = (normal(seed * 3 + i, 1, 2, 16, 8).requires_grad_() for i in range(3))
    out = Attention().explicit(q, k, v)  # [1 2 16 8]
    worst = 0.0
    for i in range(15):
        (grad,) = torch.autograd.grad(out[..., i, :].sum(), v, retain_graph=True)
        worst = max(worst, float(grad[..., i + 1 :, :].abs().max()))
    return worst


@measure("largest distance of a row's sum from 1; 0 but for rounding")
def row_sum_error(seed: int) -> float:
    return float((_captured(seed)["pattern"].sum(-1) - 1).abs().max())


@measure("largest distance between the fused kernel and the formula, in float32; 0 but for rounding")
def fused_error(seed: int) -> float:
    made = Attention()
    qkv = [normal(seed * 3 + i, 2, 4, LENGTH, WIDTH, dtype=torch.float32) for i in range(3)]
    return float((made(*qkv) - made.explicit(*qkv)).abs().max())

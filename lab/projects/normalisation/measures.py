"""Numbers of normalisation that theory knows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lab.projects.normalisation.component import LayerNorm, RMSNorm
from lab.spec import measure, normal

WIDTH = 64


def _rows(seed: int) -> torch.Tensor:
    return 2.0 + 3.0 * normal(seed, 4, 32, WIDTH)  # [B T C]


@measure("variance of LayerNorm's output where the input's variance equals eps; 1/2")
def variance_at_eps(seed: int) -> float:
    made = LayerNorm(WIDTH).double()
    x = normal(seed, 4, 32, WIDTH)  # [B T C]
    x = x / x.std(dim=-1, correction=0, keepdim=True) * made.eps**0.5
    return float(made.explicit(x).detach().var(dim=-1, correction=0).mean())


@measure("what dividing by the unbiased deviation gives, over LayerNorm's output, at n = 64; sqrt(63/64) = 0.992")
def unbiased_ratio(seed: int) -> float:
    x = _rows(seed)
    wrong = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, correction=1, keepdim=True)  # [B T C]
    return float(wrong.std() / LayerNorm(WIDTH, eps=0.0).double().explicit(x).detach().std())


@measure("root mean square of RMSNorm's output; 1 but for eps")
def rms(seed: int) -> float:
    return float(RMSNorm(WIDTH).double()(_rows(seed)).detach().square().mean(dim=-1).sqrt().mean())


@measure("the same in float16 for inputs of about 1000, by forward; 1 but for rounding")
def rms_float16(seed: int) -> float:
    x = normal(seed, 4, 32, WIDTH, dtype=torch.float16, scale=1000.0)  # [B T C]
    return float(RMSNorm(WIDTH).half()(x).detach().double().square().mean(dim=-1).sqrt().mean())


@measure("largest float16 that the explicit path squares to something finite, from where on rows become 0; 255.9")
def largest_float16(seed: int) -> float:  # noqa: ARG001 - nothing is drawn: every float16 is tried
    # The bit patterns below that of infinity are all the finite numbers of float16 from 0 on, in order.
    values = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)[:, None]  # [31744 1], one row each
    out = RMSNorm(1).half().explicit(values).detach()  # [31744 1]; 1, or x * rsqrt(inf) = 0
    return float(values[out > 0.5].max())


@measure("largest distance between LayerNorm's formula and torch's operator, in float32; 0 but for rounding")
def layer_norm_error(seed: int) -> float:
    made, x = LayerNorm(WIDTH), _rows(seed).float()
    return float((made.explicit(x) - F.layer_norm(x, (WIDTH,), made.weight, made.bias, made.eps)).detach().abs().max())


@measure("largest distance between RMSNorm's formula and torch's operator, in float32; 0 but for rounding")
def rms_norm_error(seed: int) -> float:
    made, x = RMSNorm(WIDTH), _rows(seed).float()
    return float((made.explicit(x) - F.rms_norm(x, (WIDTH,), made.weight, made.eps)).detach().abs().max())

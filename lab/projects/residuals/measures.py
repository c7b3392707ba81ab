"""Numbers of a residual stream that theory knows."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder
from lab.projects.residuals.component import Block
from lab.spec import measure, normal

ADDITIONS, WIDTH = 48, 512


def _stream(seed: int, gain: float) -> float:
    """Return the variance of a stream of variance 1 after 48 branches of variance gain^2 each."""
    x = normal(seed, 64, WIDTH)
    for i in range(ADDITIONS):
        x = x + gain * normal(seed * 1000 + i + 1, 64, WIDTH)
    return float(x.var())


@measure("variance of a stream after 48 additions of independent branches of variance 1; 1 + 48 = 49")
def variance_unscaled(seed: int) -> float:
    return _stream(seed, 1.0)


@measure("the same with each branch scaled by 1/sqrt(48); 1 + 1 = 2")
def variance_scaled(seed: int) -> float:
    return _stream(seed, ADDITIONS**-0.5)


@measure("norm of the gradient at the first of 24 blocks over that at the last; near 1, as the stream carries it")
def gradient_carried(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Block(32, 4, 24) for _ in range(24)]
    x = normal(seed, 2, 16, 32, dtype=torch.float32).requires_grad_()
    out, last = x, x
    for block in blocks:
        last = out
        out = block(out)
    first_grad, last_grad = torch.autograd.grad(out, (x, last), torch.ones_like(out))
    return float(first_grad.norm() / last_grad.norm())


def _start(seed: int, std: float) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(88, context=64, layers=2, width=64, heads=4)
        torch.nn.init.normal_(model.head.weight, std=std)
    tokens = torch.randint(88, (8, 65), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())) / math.log(88)


@measure("loss at start over ln V, head with std 0.02; 1 + 64 x 0.02^2 / 2 / ln 88 = 1.003")
def start_over_even_odds(seed: int) -> float:
    return _start(seed, 0.02)


@measure("the same, head with std 1: logits of std 8 are bets at random; several times ln V")
def start_over_even_odds_std_1(seed: int) -> float:
    return _start(seed, 1.0)

"""Numbers of activations that theory knows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lab.projects.activations import component
from lab.projects.activations.component import (
    FeedForward,
    GatedFeedForward,
    gelu_explicit,
    gelu_tanh_explicit,
    relu_explicit,
    sigmoid_explicit,
    silu_explicit,
)
from lab.spec import measure, normal, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYERS = 10
SAMPLES = 512


def _grid() -> Tensor:
    """Every 1/800 from -20 to 20, with 0 among them."""
    return torch.linspace(-20, 20, 32_001, dtype=torch.float64)


def _mean(function: Callable[[Tensor], Tensor]) -> float:
    """Return E[f(z)] for z standard normal, by a sum over the grid."""
    z = _grid()
    density = (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z) * density, z))


def _slopes(function: Callable[[Tensor], Tensor], layers: int = 1) -> Tensor:
    """Return the derivative of a function applied so many times, over the grid."""
    x = out = _grid().requires_grad_()
    for _ in range(layers):
        out = function(out)
    (slope,) = torch.autograd.grad(out.sum(), x)
    return slope


@measure("largest slope of sigmoid; 1/4, at 0")
def sigmoid_slope(_seed: int) -> float:
    return float(_slopes(sigmoid_explicit).max())


@measure("largest gradient through 10 sigmoids in a row, over 4^-10; at most 1")
def sigmoid_chain(_seed: int) -> float:
    return float(_slopes(sigmoid_explicit, LAYERS).max()) * 4.0**LAYERS


@measure("what the 11th sigmoid multiplies the gradient by; s (1 - s) = 0.2247, where s = sigmoid(s) = 0.6590")
def sigmoid_chain_factor(_seed: int) -> float:
    return float(_slopes(sigmoid_explicit, LAYERS + 1).max() / _slopes(sigmoid_explicit, LAYERS).max())


def _layer(seed: int, bias: float) -> tuple[FeedForward, Tensor]:
    """A layer whose hidden units see standard normal numbers plus `bias`, and 512 inputs, [1 T C]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FeedForward(256, 4096, activation="relu")
    with torch.no_grad():
        made.up.weight.div_(made.up.weight.norm(dim=-1, keepdim=True))
        assert made.up.bias is not None
        made.up.bias.fill_(bias)
    return made, normal(seed + 10_000_000, 1, SAMPLES, 256, dtype=torch.float32)  # not the seed of the weights


@measure("share of ReLU units that are 0 for a sample, unit-normal inputs; 1/2")
def inactive_share(seed: int) -> float:
    return float((tapped(*_layer(seed, 0.0))["hidden"] == 0).double().mean())


def _dead_share(seed: int, bias: float) -> float:
    made, x = _layer(seed, bias)
    (grad,) = torch.autograd.grad(made(x).sum(), made.up.weight)  # [F C]
    return float((grad == 0).all(dim=-1).double().mean())


@measure("share of ReLU units without any gradient over 512 samples, with a bias of -3; Phi(3)^512 = 0.501")
def dead_share(seed: int) -> float:
    return _dead_share(seed, -3.0)


@measure("the same with a bias of -5; Phi(5)^512 = 0.99985")
def dead_share_far(seed: int) -> float:
    return _dead_share(seed, -5.0)


@measure("mean square of ReLU of a standard normal; 1/2, why He's variance is 2/n")
def relu_mean_square(_seed: int) -> float:
    return _mean(lambda z: relu_explicit(z).square())


@measure("mean of GELU of a standard normal; 1/(2 sqrt pi) = 0.2821")
def gelu_mean(_seed: int) -> float:
    return _mean(gelu_explicit)


@measure("mean square of GELU of a standard normal; 1/3 + 1/(2 pi sqrt 3) = 0.4252")
def gelu_mean_square(_seed: int) -> float:
    return _mean(lambda z: gelu_explicit(z).square())


@measure("largest slope of GELU, at sqrt 2; Phi(sqrt 2) + e^-1/sqrt(pi) = 1.1289")
def gelu_slope(_seed: int) -> float:
    return float(_slopes(gelu_explicit).max())


@measure("least value of SiLU, at -1.2785; -W(1/e) = -0.2785, with W of Lambert")
def silu_minimum(_seed: int) -> float:
    return float(silu_explicit(_grid()).min())


@measure("largest distance of GELU's tanh form from GELU; 4.73e-4")
def tanh_gap(_seed: int) -> float:
    return float((gelu_tanh_explicit(_grid()) - gelu_explicit(_grid())).abs().max())


@measure("parameters of SwiGLU at C = 48, F = 128; 3 C F = 18432, here the 8 C^2 weights of a plain layer with F = 4 C")
def swiglu_parameters(_seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        return sum(p.numel() for p in GatedFeedForward(48, 128).parameters())


@measure("largest distance between the fused kernels and the formulas, in float32; 0 but for rounding")
def fused_error(seed: int) -> float:
    x = normal(seed, 100_000, dtype=torch.float32, scale=3.0)
    pairs = [
        (getattr(component, name), getattr(component, f"{name}_explicit"))
        for name in ("relu", "sigmoid", "silu", "gelu", "gelu_tanh")
    ]
    return max(float((fused(x) - formula(x)).abs().max()) for fused, formula in pairs)

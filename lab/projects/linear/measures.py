"""Numbers of linear layers that theory knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.projects.linear.component import Linear, glorot_std, he_std
from lab.spec import measure, normal

WIDTH, DEPTH = 1024, 20
INPUTS, OUTPUTS, ROWS = 256, 1024, 64


def _layer(seed: int, inputs: int, outputs: int, std: float) -> Linear:
    """Build one whose weights start with this standard deviation; leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Linear(inputs, outputs, gain=std * inputs**0.5)


def _inputs(seed: int, *shape: int) -> Tensor:
    """Draw unit-normal inputs, by a seed that is not also that of the weights: the two must be independent."""
    return normal(seed + 10_000_000, *shape, dtype=torch.float32)


def _mean_square_after_relus(seed: int, std: float) -> float:
    x = _inputs(seed, ROWS, WIDTH)  # [rows width], of mean square 1
    with torch.no_grad():
        for depth in range(DEPTH):
            x = _layer(1000 * seed + depth, WIDTH, WIDTH, std)(x).relu()
    return float(x.double().square().mean())


@measure("mean square after 20 layers with ReLU, He initialisation; about 1")
def mean_square_he(seed: int) -> float:
    return _mean_square_after_relus(seed, he_std(WIDTH))


@measure("the same with gain 1: each ReLU halves it; about 2^-20 = 9.5e-7")
def mean_square_gain_1(seed: int) -> float:
    return _mean_square_after_relus(seed, WIDTH**-0.5)


@measure("variance of an output over inputs x variance of the weights x mean square of the inputs, 256 to 1024; 1")
def variance_ratio(seed: int) -> float:
    made = _layer(seed, INPUTS, OUTPUTS, 1.0)
    x = 1.0 + _inputs(seed, ROWS, INPUTS)  # of mean 1: the mean square, 2, is not the variance, 1
    weight = made.weight.detach()
    expected = INPUTS * weight.var() * x.square().mean()
    return float(made(x).detach().var() / expected)


def _glorot(seed: int) -> tuple[Tensor, Tensor]:
    """Return the output for unit-normal inputs, and the gradient of the inputs for unit-normal ones of the output."""
    made = _layer(seed, INPUTS, OUTPUTS, glorot_std(INPUTS, OUTPUTS))
    x = _inputs(seed, ROWS, INPUTS).requires_grad_()
    y = made(x)  # [rows outputs]
    (grad,) = torch.autograd.grad(y, x, normal(seed + 20_000_000, ROWS, OUTPUTS, dtype=torch.float32))
    return y.detach(), grad  # [rows outputs], [rows inputs]


@measure("mean square of outputs over that of inputs, Glorot, 256 to 1024; 2 in / (in + out) = 0.4")
def glorot_forward(seed: int) -> float:
    return float(_glorot(seed)[0].square().mean())


@measure("mean square of gradients of inputs over that of outputs, Glorot; 2 out / (in + out) = 1.6")
def glorot_backward(seed: int) -> float:
    return float(_glorot(seed)[1].square().mean())


@measure("largest distance from nn.Linear with the same parameters, in float32; 0 but for rounding")
def torch_gap(seed: int) -> float:
    made = _layer(seed, INPUTS, OUTPUTS, INPUTS**-0.5)
    theirs = nn.Linear(INPUTS, OUTPUTS, device="meta").to_empty(device="cpu")  # draws no numbers
    theirs.load_state_dict(made.state_dict())
    x = _inputs(seed, 4, ROWS, INPUTS)
    return float((made(x) - theirs(x)).detach().abs().max())


def _flops(seed: int, *, backward: bool) -> float:
    """Count FLOPs, in units of 2 B in out."""
    made = _layer(seed, INPUTS, OUTPUTS, INPUTS**-0.5)
    x = _inputs(seed, 4, ROWS, INPUTS).requires_grad_()  # B = 4 x rows
    with FlopCounterMode(display=False) as counter:
        y = made(x)
        if backward:
            y.sum().backward()
    return float(counter.get_total_flops()) / (2 * 4 * ROWS * INPUTS * OUTPUTS)


@measure("FLOPs of a forward pass as counted by torch, over 2 B in out; 1")
def flops_forward(seed: int) -> float:
    return _flops(seed, backward=False)


@measure("FLOPs of forward and backward as counted by torch, over 2 B in out; 3")
def flops_with_backward(seed: int) -> float:
    return _flops(seed, backward=True)

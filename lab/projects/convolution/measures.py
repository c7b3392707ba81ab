"""Numbers of convolutions that theory knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.projects.convolution.component import CausalConv1d, Conv2d, ConvMixer, conv2d_im2col, im2col
from lab.spec import measure, normal, tapped

WIDTH, LENGTH, ROWS, KERNEL, DEPTH = 64, 64, 64, 4, 4
INPUTS, OUTPUTS, SIDE = 16, 32, 12


def _line(seed: int, width: int = WIDTH) -> CausalConv1d:
    """Build one; leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CausalConv1d(width, width, KERNEL)


def _plane(seed: int) -> Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Conv2d(INPUTS, OUTPUTS, 3, padding=1)


def _inputs(seed: int, *shape: int) -> Tensor:
    """Draw unit-normal inputs, by a seed that is not also that of the weights: the two must be independent."""
    return normal(seed + 10_000_000, *shape, dtype=torch.float32)


def _mean_squares(seed: int) -> Tensor:
    """Return the mean square of the output at each position, [T]."""
    with torch.no_grad():
        out: Tensor = _line(seed)(_inputs(seed, ROWS, LENGTH, WIDTH))  # [B T C]
    return out.square().mean(dim=(0, 2))


@measure("mean square of outputs with a full window, over unit-normal inputs; 1")
def mean_square(seed: int) -> float:
    return float(_mean_squares(seed)[KERNEL - 1 :].mean())


@measure("the same at the first position, which sees kernel - 1 = 3 zeros; 1/4")
def mean_square_at_the_start(seed: int) -> float:
    return float(_mean_squares(seed)[0])


@measure("largest |d out_i / d x_j| for j > i; 0")
def future_gradient(seed: int) -> float:
    x = _inputs(seed, 1, 16, 8).requires_grad_()
    out = _line(seed, 8).explicit(x)  # [1 16 8]
    worst = 0.0
    for i in range(15):
        (grad,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        worst = max(worst, float(grad[:, i + 1 :].abs().max()))
    return worst


@measure("positions that the last output of 4 layers of kernel 4 depends on; 1 + 4 x 3 = 13")
def receptive_field(seed: int) -> float:
    x = _inputs(seed, 1, LENGTH, 8).requires_grad_()
    stack = nn.Sequential(*(_line(1000 * seed + depth, 8) for depth in range(DEPTH)))
    (grad,) = torch.autograd.grad(stack(x)[:, -1].sum(), x)
    return float((grad.abs().amax(dim=(0, 2)) > 0).sum())


@measure("mean square of what passes the gate; E[sigmoid(z)^2] = 0.293 for unit-normal z")
def gated_mean_square(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ConvMixer(WIDTH, kernel=KERNEL)
    with torch.no_grad():
        gated = tapped(made, _inputs(seed, ROWS, LENGTH, WIDTH))["gated"]  # [B T C]
    return float(gated[:, KERNEL - 1 :].square().mean())


@measure("parameters of a 3 x 3 convolution from 16 channels to 32; 9 x 16 x 32 + 32 = 4640")
def parameters(seed: int) -> float:
    return float(sum(p.numel() for p in _plane(seed).parameters()))


@measure("numbers that im2col lays out over numbers of the input, 3 x 3 with stride 1 and padding 1; 9")
def im2col_growth(seed: int) -> float:
    x = _inputs(seed, 2, INPUTS, SIDE, SIDE)
    return im2col(x, 3, padding=1).numel() / x.numel()


@measure("FLOPs of a forward pass as counted by torch, over 2 B Y X K^2 Cin Cout; 1")
def flops_forward(seed: int) -> float:
    with FlopCounterMode(display=False) as counter:
        _plane(seed)(_inputs(seed, 2, INPUTS, SIDE, SIDE))
    return float(counter.get_total_flops()) / (2 * 2 * SIDE * SIDE * 9 * INPUTS * OUTPUTS)


@measure("largest distance between the fused causal convolution and its windows, in float32; 0 but for rounding")
def fused_error(seed: int) -> float:
    made, x = _line(seed), _inputs(seed, 2, LENGTH, WIDTH)
    return float((made(x) - made.explicit(x)).detach().abs().max())


@measure("largest distance between im2col and torch's own conv2d, in float32; 0 but for rounding")
def im2col_error(seed: int) -> float:
    made, x = _plane(seed), _inputs(seed, 2, INPUTS, SIDE, SIDE)
    return float((made(x) - conv2d_im2col(x, made.weight, made.bias, padding=1)).detach().abs().max())

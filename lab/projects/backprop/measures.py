"""Numbers of backpropagation and optimisers that theory knows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from lab.projects.backprop.component import (
    SGD,
    Adam,
    AdamW,
    Foreach,
    Variable,
    clip_gradients,
    cross_entropy,
    learning_rate,
)
from lab.spec import measure, normal

if TYPE_CHECKING:
    from torch import Tensor


def _weights(seed: int) -> list[Tensor]:
    """Two layers: w [16 32], b [32], v [32 5], c [5]."""
    return [normal(seed + i, *shape, scale=0.3) for i, shape in enumerate(((16, 32), (32,), (32, 5), (5,)))]


def _data(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [64 16] and classes [64]."""
    return normal(seed + 10, 64, 16), torch.randint(5, (64,), generator=torch.Generator().manual_seed(seed))


def _ours(weights: list[Tensor], seed: int) -> tuple[Variable, list[Variable]]:
    x, y = _data(seed)
    w, b, v, c = leaves = [Variable(p) for p in weights]
    return cross_entropy((x @ w + b).tanh() @ v + c, y), leaves


def _gradient(leaf: Variable) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@measure("largest gap between the gradients of a network of two layers and torch's, in float64; 0 but for rounding")
def torch_gap(seed: int) -> float:
    weights = _weights(seed)
    loss, leaves = _ours(weights, seed)
    loss.backward()
    x, y = _data(seed)
    w, b, v, c = theirs = [p.clone().requires_grad_() for p in weights]
    expected = torch.autograd.grad(F.cross_entropy((x @ w + b).tanh() @ v + c, y), theirs)
    return max(float((_gradient(leaf) - grad).abs().max()) for leaf, grad in zip(leaves, expected, strict=True))


@measure("largest gap between 40 of those gradients and central differences of step 1e-5; h^2 and rounding / h: < 1e-9")
def finite_difference_gap(seed: int) -> float:
    weights, h, gaps = _weights(seed), 1e-5, []
    loss, leaves = _ours(weights, seed)
    loss.backward()
    for p, leaf in zip(weights, leaves, strict=True):
        entries, slopes = p.view(-1), _gradient(leaf).view(-1)
        for i in torch.linspace(0, p.numel() - 1, 10).long().tolist():
            kept, ends = float(entries[i]), []
            for moved in (kept + h, kept - h):
                entries[i] = moved
                ends.append(float(_ours(weights, seed)[0].value))
            entries[i] = kept
            gaps.append(abs((ends[0] - ends[1]) / (2 * h) - float(slopes[i])))
    return max(gaps)


@measure("gradient through a chain of 10,000 products by 1.0001; 1.0001^10000 = 2.71815")
def long_chain_gradient(_seed: int) -> float:
    x = y = Variable(torch.ones((), dtype=torch.float64))
    for _ in range(10_000):
        y = y * 1.0001
    y.backward()
    return float(_gradient(x))


def _step_sizes(optimizer: Foreach, p: Tensor, steps: int) -> list[float]:
    """Return how far the first entry moves at each step, in rates, while the gradient stays as it is."""
    sizes = []
    for _ in range(steps):
        before = float(p[0])
        optimizer.step()
        sizes.append(abs(float(p[0]) - before) / float(optimizer.param_groups[0]["lr"]))
    return sizes


def _constant_gradient(seed: int) -> Tensor:
    p = torch.zeros(4, dtype=torch.float64)
    p.grad = 1 + normal(seed, 4).abs()
    return p


@measure("size of Adam's first step over the rate; 1, whatever the gradient")
def adam_first_step(seed: int) -> float:
    p = _constant_gradient(seed)
    return _step_sizes(Adam([p], lr=1e-3), p, 1)[0]


@measure("the same without bias correction, betas .9 and .999; (1 - .9) / sqrt(1 - .999) = 3.162")
def uncorrected_first_step(seed: int) -> float:
    p = _constant_gradient(seed)
    return _step_sizes(Adam([p], lr=1e-3, bias_correction=False), p, 1)[0]


@measure("largest step without bias correction, gradient constant; max over t of (1 - .9^t) / sqrt(1 - .999^t) = 6.57")
def uncorrected_largest_step(seed: int) -> float:
    p = _constant_gradient(seed)
    return max(_step_sizes(Adam([p], lr=1e-3, bias_correction=False), p, 100))


@measure("step of SGD with momentum .9 over lr g, once it has settled; 1 / (1 - .9) = 10")
def momentum_gain(seed: int) -> float:
    p = _constant_gradient(seed)
    assert p.grad is not None
    return _step_sizes(SGD([p], lr=1e-3, momentum=0.9), p, 300)[-1] / float(p.grad[0])


@measure("largest gap to torch.optim.AdamW over 100 steps, in float64; 0 but for rounding")
def adamw_gap(seed: int) -> float:
    ours, theirs = _weights(seed), _weights(seed)
    mine = AdamW(ours, lr=1e-2)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    gap = 0.0
    for step in range(100):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = normal(seed + 1000 + 10 * step + i, *p.shape)
        mine.step()
        reference.step()
        gap = max(gap, *(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True)))
    return gap


@measure("a weight after 100 steps of AdamW without gradient, over (1 - lr decay)^100 of itself; 1")
def decay_of_adamw(seed: int) -> float:
    p = _constant_gradient(seed) + 2.0
    p.grad, begun = torch.zeros_like(p), float(p[0])
    optimizer = AdamW([p], lr=0.01, weight_decay=0.1)
    for _ in range(100):
        optimizer.step()
    return float(p[0]) / (begun * (1 - 0.01 * 0.1) ** 100)


@measure("first step of Adam by coupled decay alone, over the rate; 1, whatever the decay: the quotient cancels it")
def decay_of_adam(seed: int) -> float:
    p = _constant_gradient(seed) + 2.0
    p.grad = torch.zeros_like(p)
    return _step_sizes(Adam([p], lr=1e-3, weight_decay=0.01), p, 1)[0]


@measure("how far a bfloat16 weight of 1 moved in 100 steps of AdamW at a rate of 1e-3; 0, where it should be 0.1")
def moved_in_bfloat16(_seed: int) -> float:
    p = torch.ones(1, dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        optimizer.step()
    return 1 - float(p)


@measure("joint norm of large gradients after clipping, over the limit; 1")
def clipped_norm(seed: int) -> float:
    weights, limit = _weights(seed), 0.7
    for i, p in enumerate(weights):
        p.grad = normal(seed + 20 + i, *p.shape, scale=100.0)
    clip_gradients(weights, limit)
    return math.sqrt(sum(float(p.grad.square().sum()) for p in weights if p.grad is not None)) / limit


@measure("rate at the last step of warmup, over the peak; 1")
def rate_at_peak(_seed: int) -> float:
    return learning_rate(99, peak=3e-3, warmup=100, total=1000) / 3e-3


@measure("rate at the last step, over floor times peak; 1")
def rate_at_end(_seed: int) -> float:
    return learning_rate(999, peak=3e-3, warmup=100, total=1000, floor=0.1) / (0.1 * 3e-3)

"""FLOPs and bytes, as they are counted, equal the closed forms of the projects' mathematics, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lab.profiling.costs import Cost
from lab.profiling.counting import Counter
from lab.profiling.memory import Ledger
from lab.profiling.places import Places
from lab.projects.attention.component import Attention
from lab.projects.convolution.component import Conv2d
from lab.projects.linear.component import Linear
from lab.projects.residuals.component import Block

if TYPE_CHECKING:
    from torch import Tensor, nn

SIZE = st.integers(1, 9)
BYTES = 4  # of a number in float32


def counted(module: nn.Module, *inputs: Tensor) -> tuple[Cost, Cost]:
    """What a module costs forward and backward."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    counter = Counter(Ledger(module, optimizer))
    with Places(module) as places, counter:
        places.follow(counter)
        out = module(*inputs)
        out.backward(torch.ones_like(out))
    ways = {"forward": Cost(), "backward": Cost()}
    for (place, _), cost in counter.costs.items():
        if place.direction in ways:
            ways[place.direction].add(cost)
    return ways["forward"], ways["backward"]


def linear_back(b: int, n: int, m: int) -> tuple[int, int]:
    """Numbers read and written: ``G W``, ``G^T X``, and the sum of G for the bias."""
    return (b * m + n * m) + (b * m + b * n) + b * m, b * n + n * m + m


@settings(max_examples=25, deadline=None)
@given(b=SIZE, n=SIZE, m=SIZE)
def test_a_linear_layer(b: int, n: int, m: int) -> None:
    forward, backward = counted(Linear(n, m), torch.randn(b, n, requires_grad=True))
    assert forward.flops == 2 * b * n * m
    assert backward.flops == 4 * b * n * m
    assert forward.bytes == BYTES * (b * n + n * m + m + b * m)  # inputs, weights, bias; outputs
    assert backward.bytes == BYTES * sum(linear_back(b, n, m))


@settings(max_examples=25, deadline=None)
@given(b=SIZE, h=SIZE, t=st.integers(2, 9), d=SIZE)
def test_attention(b: int, h: int, t: int, d: int) -> None:
    q, k, v = (torch.randn(b, h, t, d, requires_grad=True) for _ in range(3))
    forward, backward = counted(Attention(), q, k, v)
    assert forward.flops == 4 * b * h * t * t * d
    assert backward.flops == 2 * forward.flops
    # Queries, keys, values and outputs; the kernel keeps a sum for each row beside.
    assert forward.bytes == BYTES * (4 * b * h * t * d + b * h * t)


def test_explicit_attention_costs_the_same_products() -> None:
    class Explicit(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    forward, backward = counted(Explicit(), *(torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)))
    assert (forward.flops, backward.flops) == (4 * 2 * 3 * 5 * 5 * 4, 8 * 2 * 3 * 5 * 5 * 4)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), channels=st.integers(1, 4), out=st.integers(1, 4), side=st.integers(3, 7))
def test_a_convolution(b: int, channels: int, out: int, side: int) -> None:
    forward, backward = counted(
        Conv2d(channels, out, kernel=3), torch.randn(b, channels, side, side, requires_grad=True)
    )
    places = F.conv2d(torch.zeros(1, 1, side, side), torch.zeros(1, 1, 3, 3)).numel()
    assert forward.flops == 2 * b * places * 9 * channels * out
    assert backward.flops == 2 * forward.flops
    x, w, y = b * channels * side * side, out * channels * 9, b * out * places
    assert forward.bytes == BYTES * (x + w + out + y)
    assert backward.bytes == BYTES * ((y + x + w) + (x + w + out))


@pytest.mark.parametrize(("b", "t", "c", "heads"), [(2, 5, 8, 2), (3, 16, 32, 4)])
def test_a_whole_block(b: int, t: int, c: int, heads: int) -> None:
    forward, backward = counted(Block(c, heads, 2), torch.randn(b, t, c, requires_grad=True))
    assert forward.flops == 24 * b * t * c * c + 4 * b * t * t * c
    assert backward.flops == 2 * forward.flops
    n, stream, rows = b * t, b * t * c, b * heads * t
    linears = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]
    norm = (stream + 2 * c) + (stream + 2 * n)  # gain and shift; mean and deviation of each row
    assert forward.bytes == BYTES * (
        2 * norm
        + sum(n * i + i * o + o + n * o for i, o in linears)
        + (3 * stream + stream + rows)  # attention
        + 2 * 4 * stream  # GELU
        + 2 * 3 * stream  # the sums of the residual stream
    )
    norm_back = (2 * stream + 2 * n + 2 * c) + (stream + 2 * c)
    assert backward.bytes == BYTES * (
        2 * norm_back
        + sum(sum(linear_back(n, i, o)) for i, o in linears)
        + (5 * stream + rows + 3 * stream)  # attention, from its output and its sums
        + 2 * 3 * stream  # the gradients of queries, keys and values side by side
        + 3 * 4 * stream  # GELU
        + 2 * 3 * stream  # where the stream parted, its gradients are added
    )


def test_views_cost_nothing_and_are_counted_apart() -> None:
    class View(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).reshape(-1)[1:].view(1, -1)

    forward, _ = counted(View(), torch.randn(4, 1, requires_grad=True))
    assert (forward.calls, forward.bytes) == (0, 0)
    assert forward.views >= 3


def test_a_look_up_reads_what_it_is_asked_for() -> None:
    table = torch.nn.Embedding(1000, 4)
    forward, _ = counted(table, torch.tensor([1, 2, 3]))
    assert forward.bytes == BYTES * 3 * 4 * 2 + 3 * 8  # rows read and written, and the numbers that ask for them


def test_what_strides_repeat_is_read_once() -> None:
    class Add(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(1).expand(4, 8)

    forward, _ = counted(Add(), torch.randn(4, 8, requires_grad=True))
    assert forward.bytes == BYTES * (32 + 1 + 32) + BYTES  # and the 1 is written

"""GELU against `F.gelu` and the normal distribution, and the feed-forward layer against its formula."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.projects.activations.component import FeedForward, gelu, gelu_explicit
from lab.sites import sites_of

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=20)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(numbers)
def test_the_formula_equals_the_kernel(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(gelu_explicit(x), F.gelu(x), rtol=1e-12, atol=1e-14)
    assert torch.equal(gelu(x), F.gelu(x))


@quick
@given(numbers)
def test_is_x_times_the_distribution_function_of_the_standard_normal(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in values], dtype=torch.float64)
    torch.testing.assert_close(gelu_explicit(x), expected, rtol=1e-12, atol=1e-14)


@quick
@given(numbers)
def test_differs_from_its_mirror_image_by_x(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(gelu_explicit(x) - gelu_explicit(-x), x, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    x = normal(0, 12).requires_grad_()
    assert torch.autograd.gradcheck(gelu_explicit, (x,))
    made = FeedForward(3, 5).double()
    assert torch.autograd.gradcheck(made, (normal(1, 2, 3, 3).requires_grad_(),))


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(1, 16), st.integers(0, 999))
def test_feed_forward_is_widen_gelu_narrow(batch: int, length: int, width: int, hidden: int, seed: int) -> None:
    torch.manual_seed(seed)
    made, x = FeedForward(width, hidden).double(), normal(seed, batch, length, width)
    wide = F.gelu(F.linear(x, made.up.weight, made.up.bias))
    expected = F.linear(wide, made.down.weight, made.down.bias)
    with sites_of(made).capture("*") as values:
        torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values["hidden"], wide, rtol=1e-12, atol=1e-12)


def test_each_position_is_computed_on_its_own() -> None:
    made, x = FeedForward(4, 8).double(), normal(0, 2, 5, 4)
    moved = x.clone()
    moved[0, 3] += 1.0
    change = (made(moved) - made(x)).abs().amax(-1)  # [2 5]
    assert change[0, 3] > 0
    change[0, 3] = 0
    assert not change.any()


def test_the_gain_scales_only_what_is_added_to_the_stream() -> None:
    torch.manual_seed(0)
    one = FeedForward(64, 256)
    torch.manual_seed(0)
    half = FeedForward(64, 256, gain=0.5)
    assert torch.equal(one.up.weight, half.up.weight)
    torch.testing.assert_close(half.down.weight, 0.5 * one.down.weight)

"""Layer normalisation: the formula, the fused kernel and `F.layer_norm` are one; mean 0, variance 1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.projects.normalisation.component import LayerNorm

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = given(st.lists(st.integers(1, 4), max_size=2), st.integers(2, 40), st.integers(0, 999))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int, width: int, eps: float = 1e-5) -> LayerNorm:
    made = LayerNorm(width, eps=eps).double()
    with torch.no_grad():
        made.weight.copy_(normal(seed, width))
        made.bias.copy_(normal(seed + 1, width))
    return made


@quick
@sizes
def test_the_formula_and_the_fused_path_equal_the_operator_of_torch(lead: list[int], width: int, seed: int) -> None:
    made, x = layer(seed, width), 5.0 + 3.0 * normal(seed + 2, *lead, width)
    expected = F.layer_norm(x, (width,), made.weight, made.bias, 1e-5)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.explicit(x), expected, rtol=1e-10, atol=1e-12)


@quick
@sizes
def test_starts_with_mean_0_and_variance_1_over_the_width(lead: list[int], width: int, seed: int) -> None:
    x = 5.0 + 3.0 * normal(seed, *lead, width)
    for path in (LayerNorm(width, eps=0.0).double(), LayerNorm(width, eps=0.0).double().explicit):
        y = path(x)
        torch.testing.assert_close(y.mean(-1), torch.zeros(lead, dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(y.var(-1, correction=0), torch.ones(lead, dtype=torch.float64), rtol=0, atol=1e-9)


@quick
@given(st.integers(2, 20), st.floats(0.1, 10), st.floats(-10, 10), st.integers(0, 999))
def test_scale_and_shift_of_the_input_change_nothing(width: int, scale: float, shift: float, seed: int) -> None:
    made, x = layer(seed, width, eps=0.0), normal(seed, 3, width)
    torch.testing.assert_close(made.explicit(scale * x + shift), made.explicit(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0, -4096.0])
def test_a_row_without_variance_gives_the_bias_and_finite_gradients(value: float) -> None:
    made = layer(0, 8)
    for path in (made, made.explicit):
        x = torch.full((2, 8), value, dtype=torch.float64, requires_grad=True)
        y = path(x)
        torch.testing.assert_close(y, made.bias.expand(2, 8))
        y.square().sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_eps_stands_inside_the_root() -> None:
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)  # variance 1
    made = LayerNorm(2, eps=3.0).double()
    for path in (made, made.explicit):
        torch.testing.assert_close(path(x), x / 2.0)


def test_gradients_are_those_of_finite_differences() -> None:
    made, x = layer(0, 5), normal(1, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(made.explicit, (x,))
    assert torch.autograd.gradcheck(made, (x,))

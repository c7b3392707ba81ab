"""The residual block: two branches, each added to a stream that passes by unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lab.projects.residuals.component import Block
from lab.sites import sites_of

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.integers(0, 999))
def test_each_branch_reads_the_normalised_stream_and_is_added_to_it(
    heads: int, each: int, length: int, layers: int, seed: int
) -> None:
    torch.manual_seed(seed)
    block, x = Block(heads * each, heads, layers).double(), normal(seed, 2, length, heads * each)
    assert block.attn is not None
    assert block.attn_norm is not None
    middle = x + block.attn(block.attn_norm.explicit(x))
    expected = middle + block.mlp(block.mlp_norm.explicit(middle))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-10)


def test_with_silent_branches_the_stream_and_its_gradient_pass_unchanged() -> None:
    block, x = Block(8, 2, 1), normal(0, 2, 5, 8, dtype=torch.float32).requires_grad_()
    assert block.attn is not None
    for projection in (block.attn.proj, block.mlp.down):
        nn.init.zeros_(projection.weight)
    assert torch.equal(block(x), x)
    grad = torch.randn(2, 5, 8)
    block(x).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("layers", [1, 2, 8, 32])
def test_each_branch_ends_in_a_gain_of_1_over_the_root_of_2_layers(layers: int) -> None:
    torch.manual_seed(0)
    block = Block(128, 4, layers)
    assert block.attn is not None
    for projection, inputs in ((block.attn.proj, 128), (block.mlp.down, 512)):
        weight = projection.weight.detach()
        std = (2 * layers) ** -0.5 * inputs**-0.5
        assert float(weight.std()) == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5)


@pytest.mark.parametrize("layers", [1, 4, 16])
def test_the_variance_that_a_feed_forward_branch_adds_is_that_of_gelu_over_2_layers(layers: int) -> None:
    torch.manual_seed(0)
    block, x = Block(128, 4, layers), normal(0, 4, 64, 128, dtype=torch.float32)
    with sites_of(block).capture("mlp.out") as values, torch.no_grad():
        block(x)
    # For z standard normal, E[gelu(z)^2] = 0.425, by quadrature.
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
    square = float((torch.nn.functional.gelu(z).square() * density).sum() * 1e-3)
    assert square == pytest.approx(0.425, abs=1e-3)
    assert float(values["mlp.out"].square().mean()) == pytest.approx(square / (2 * layers), rel=0.1)


def test_no_output_depends_on_a_later_input() -> None:
    block, x = Block(16, 2, 2), normal(0, 2, 12, 16, dtype=torch.float32)
    moved = x.clone()
    moved[:, 7:] += 1.0
    with torch.no_grad():
        before, after = block(x), block(moved)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(Block(4, 2, 1).double(), (normal(1, 1, 3, 4).requires_grad_(),))

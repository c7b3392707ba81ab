"""Multi-head attention against attention in loops, its size, and the symmetry of its heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.multihead.component import MultiHeadAttention
from lab.sites import sites_of

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def layer(seed: int, width: int, heads: int) -> MultiHeadAttention:
    torch.manual_seed(seed)
    made = MultiHeadAttention(width, heads).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases too
    return made


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_equals_each_head_on_its_own_slice_of_the_width(heads: int, each: int, length: int, seed: int) -> None:
    width = heads * each
    made, x = layer(seed, width, heads), normal(seed, 2, length, width)
    q, k, v = F.linear(x, made.qkv.weight, made.qkv.bias).chunk(3, dim=-1)
    mixed = torch.empty_like(x)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for h in range(heads):
        part = slice(h * each, (h + 1) * each)
        scores = q[..., part] @ k[..., part].transpose(-2, -1) / each**0.5
        mixed[..., part] = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v[..., part]
    torch.testing.assert_close(made(x), F.linear(mixed, made.proj.weight, made.proj.bias), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (12, 3), (64, 4)])
def test_has_4_c_squared_and_4_c_parameters_whatever_the_number_of_heads(width: int, heads: int) -> None:
    assert sum(p.numel() for p in MultiHeadAttention(width, heads).parameters()) == 4 * width**2 + 4 * width


@quick
@given(st.permutations(range(4)), st.integers(1, 4), st.integers(0, 999))
def test_permuting_the_heads_consistently_changes_nothing(order: list[int], each: int, seed: int) -> None:
    width = 4 * each
    made, permuted, x = layer(seed, width, 4), layer(seed, width, 4), normal(seed, 2, 5, width)
    columns = torch.cat([torch.arange(h * each, (h + 1) * each) for h in order])  # [C]
    rows = torch.cat([columns + part * width for part in range(3)])  # [3C]: of queries, keys and values
    assert permuted.qkv.bias is not None
    with torch.no_grad():
        permuted.qkv.weight.copy_(permuted.qkv.weight[rows])
        permuted.qkv.bias.copy_(permuted.qkv.bias[rows])
        half_way = permuted(x)
        permuted.proj.weight.copy_(permuted.proj.weight[:, columns])
    torch.testing.assert_close(permuted(x), made(x), rtol=1e-10, atol=1e-12)
    if order != [0, 1, 2, 3]:
        assert not torch.allclose(half_way, made(x))


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_merging_undoes_splitting(heads: int, each: int, length: int, seed: int) -> None:
    made, x = layer(seed, heads * each, heads), normal(seed, 3, length, heads * each)
    split = made.split(x)
    assert split.shape == (3, heads, length, each)
    assert torch.equal(made.merge(split), x)


def test_a_width_that_is_no_multiple_of_the_heads_is_refused_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"width = 10 .*heads = 4"):
        MultiHeadAttention(10, 4)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(layer(0, 6, 2), (normal(1, 1, 4, 6).requires_grad_(),))


def test_its_sites_hold_queries_keys_and_values_by_head() -> None:
    made, x = layer(0, 6, 2), normal(0, 2, 5, 6)
    with sites_of(made).capture("*") as values:
        out = made(x)
    assert [tuple(values[name].shape) for name in ("q", "k", "v")] == [(2, 2, 5, 3)] * 3
    joined = torch.cat([made.merge(values[name]) for name in ("q", "k", "v")], dim=-1)
    torch.testing.assert_close(joined, F.linear(x, made.qkv.weight, made.qkv.bias))
    assert values["out"] is out

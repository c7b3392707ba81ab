"""Embeddings as linear layers on one-hot vectors, and the rows of the learned positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.positions.component import (
    Embedding,
    LearnedPositions,
    SinusoidalPositions,
    alibi_bias,
    rotate,
)

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@quick
@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 999),
)
def test_an_embedding_is_a_linear_layer_on_one_hot_vectors(count: int, width: int, shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    made = Embedding(count, width).double()
    tokens = torch.randint(count, shape)
    expected = F.one_hot(tokens, count).double() @ made.weight
    torch.testing.assert_close(made(tokens), expected, rtol=0, atol=0)


def test_the_gradient_of_a_row_is_the_sum_over_the_places_where_its_token_stands() -> None:
    made = Embedding(4, 2).double()
    tokens = torch.tensor([[0, 2, 2], [2, 0, 3]])
    grad = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    made(tokens).backward(grad)
    expected = torch.zeros(4, 2, dtype=torch.float64).index_add_(0, tokens.reshape(-1), grad.view(-1, 2))
    assert made.weight.grad is not None
    torch.testing.assert_close(made.weight.grad, expected)
    assert not made.weight.grad[1].any()


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("cls", [Embedding, LearnedPositions])
def test_tables_start_with_the_standard_deviation_asked_for(
    cls: type[Embedding | LearnedPositions], std: float
) -> None:
    torch.manual_seed(0)
    weight = cls(200, 200, std=std).weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5)
    assert abs(float(weight.mean())) < 4 * std / weight.numel() ** 0.5


@quick
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_positions_are_the_first_rows_of_their_table(context: int, width: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, context))
    made = LearnedPositions(context, width)
    assert torch.equal(made(length), made.weight[:length])


def test_a_text_that_is_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"7 tokens.* 6 \(model.context\)"):
        LearnedPositions(6, 2)(7)


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_turned_queries_and_keys_meet_at_their_distance_alone(shift: int) -> None:
    q, k = (torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    near = (rotate(q, 5) * rotate(k, 2)).sum(-1)
    torch.testing.assert_close((rotate(q, 5 + shift) * rotate(k, 2 + shift)).sum(-1), near, rtol=0, atol=1e-4)
    assert not torch.allclose((rotate(q, 5 + shift) * rotate(k, 2)).sum(-1), near, atol=1e-3)
    torch.testing.assert_close(rotate(q, shift).norm(), q.norm(), rtol=1e-5, atol=0)


def test_positions_from_a_start_are_a_slice_of_all() -> None:
    x = torch.randn(1, 1, 9, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x)[..., 4:, :], rotate(x[..., 4:, :], 4))
    for made in (LearnedPositions(9, 6), SinusoidalPositions(9, 6)):
        assert torch.equal(made(9)[4:], made(5, 4))
        with pytest.raises(BadInput, match="10 tokens, but the model has positions for 9"):
            made(5, 5)


def test_a_sinusoid_has_a_squared_norm_of_half_the_width_and_alibi_falls_with_distance() -> None:
    torch.testing.assert_close(SinusoidalPositions(50, 16)(50).square().sum(-1), torch.full((50,), 8.0))
    bias = alibi_bias(8, 3, 5)  # the queries are positions 2, 3 and 4
    assert bias.shape == (8, 3, 5)
    assert bias[0, 2].tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0]
    assert bias[7, 0, 0] == -2 * 2.0**-8

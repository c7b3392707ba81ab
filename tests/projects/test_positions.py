"""Embeddings as linear layers on one-hot vectors, and the rows of the learned positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.positions.component import Embedding, LearnedPositions

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

"""The decoder as a whole: causal, at even odds when it starts, and of a variance that depth does not change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.decoder.component import Decoder
from lab.sites import sites_of

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def decoder(seed: int = 0, **changes: int) -> Decoder:
    torch.manual_seed(seed)
    size = {"vocabulary": 11, "context": 16, "layers": 2, "width": 16, "heads": 2, **changes}
    return Decoder(size.pop("vocabulary"), **size)  # type: ignore[arg-type]


def tokens(seed: int, *shape: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(st.integers(0, 999), st.integers(2, 16), st.data())
def test_no_logit_depends_on_a_later_token_by_a_single_bit(seed: int, length: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, length - 1))
    model, before = decoder(seed), tokens(seed, 2, length)
    after = before.clone()
    after[:, place] = (after[:, place] + 1) % 11
    with torch.no_grad():
        a, b = model(before), model(after)
    assert torch.equal(a[:, :place], b[:, :place])
    assert not torch.equal(a[:, place], b[:, place])


def test_a_logit_depends_on_every_earlier_token_and_on_their_order() -> None:
    model, before = decoder(), tokens(0, 1, 8)
    with torch.no_grad():
        last = model(before)[0, -1]
        for place in range(8):
            after = before.clone()
            after[:, place] = (after[:, place] + 1) % 11
            assert not torch.equal(model(after)[0, -1], last)
        swapped = before[:, [1, 0, *range(2, 8)]]
        assert not torch.equal(before, swapped)
        assert not torch.allclose(model(swapped)[0, -1], last, rtol=0, atol=1e-6)


def test_no_row_of_a_batch_depends_on_another() -> None:
    model, rows = decoder().double(), tokens(0, 3, 8)
    together = model(rows)
    for i in range(3):
        torch.testing.assert_close(model(rows[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_one_parameter(tied: bool) -> None:
    model = decoder(tied=tied)
    assert (model.head.weight is model.tokens.weight) == tied
    c, layers = 16, 2
    block = 4 * c**2 + 4 * c + 8 * c**2 + 5 * c + 4 * c  # attention, feed-forward, two norms
    tables = 11 * c * (1 if tied else 2) + 16 * c
    assert sum(p.numel() for p in model.parameters()) == layers * block + tables + 2 * c
    model(tokens(0, 2, 8)).square().sum().backward()
    with torch.no_grad():
        for p in set(model.parameters()):
            assert p.grad is not None
            p.sub_(p.grad)
    assert torch.equal(model.head.weight, model.tokens.weight) == tied


@pytest.mark.parametrize("width", [64, 256])
def test_the_loss_starts_at_the_logarithm_of_the_vocabulary_plus_half_the_variance_of_the_logits(
    width: int,
) -> None:
    vocabulary, excess = 100, width * 0.02**2 / 2
    model = decoder(width=width, vocabulary=vocabulary, context=64)
    rows = tokens(0, 64, 65, vocabulary=vocabulary)
    with torch.no_grad():
        logits = model(rows[:, :-1])  # [64 64 V]
    assert float(logits.var()) == pytest.approx(2 * excess, rel=0.1)
    losses = F.cross_entropy(logits.reshape(-1, vocabulary), rows[:, 1:].reshape(-1), reduction="none")
    # Random targets: the mean over n tokens has a spread of sqrt(2 excess / n).
    assert float(losses.mean()) == pytest.approx(
        math.log(vocabulary) + excess, abs=4 * (2 * excess / len(losses)) ** 0.5
    )


@pytest.mark.parametrize("layers", [1, 2, 4, 8, 16])
def test_the_variance_of_the_residual_stream_grows_to_the_same_size_at_any_depth(layers: int) -> None:
    model, rows = decoder(layers=layers, width=64, heads=4), tokens(0, 8, 16)
    with sites_of(model).capture("blocks.*.out") as values, torch.no_grad():
        model(rows)
    variances = [float(value.var()) for value in values.values()]
    # Over all blocks the feed-forward branches bring E[gelu(z)^2] / 2 = 0.425 / 2; the attention branches, averages
    # of values of variance 1, at most 1 / 2; the embeddings 2 x 0.02^2.
    assert variances[-1] > 0.8 * 0.425 / 2
    assert max(variances) < 1.2 * (0.425 + 1) / 2 + 2 * 0.02**2


@quick
@given(st.integers(1, 16), st.integers(1, 4))
def test_any_length_up_to_the_context_gives_a_row_of_logits_for_each_token(length: int, batch: int) -> None:
    assert decoder()(tokens(0, batch, length)).shape == (batch, length, 11)


def test_an_input_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"17 tokens.* 16 \(model.context\)"):
        decoder()(tokens(0, 1, 17))


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    first, same, other = decoder(0), decoder(0), decoder(1)
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_every_parameter_has_a_gradient() -> None:
    model, rows = decoder(), tokens(0, 4, 16)
    loss = F.cross_entropy(model(rows).flatten(0, 1), tokens(1, 4, 16).flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # A key's bias adds the same to every score of a row, and softmax does not see it.
        grad = p.grad.view(3, -1)[[0, 2]] if name.endswith("qkv.bias") else p.grad
        assert grad.any(), name

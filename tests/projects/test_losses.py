"""Cross-entropy against `F.cross_entropy`, with targets left out and with logits that would overflow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.projects.losses.component import cross_entropy, cross_entropy_explicit, token_losses

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def problem(seed: int, rows: int, classes: int, ignore: int = -100, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [N V] and targets [N], about a third of them left out, but never all."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    targets = torch.randint(classes, (rows,), generator=draw)
    left_out = torch.rand(rows, generator=draw) < 1 / 3
    left_out[0] = False
    return logits, targets.masked_fill(left_out, ignore)


@quick
@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from([-100, -1, 99]), st.integers(0, 999))
def test_the_formula_equals_the_kernel_with_targets_left_out(rows: int, classes: int, ignore: int, seed: int) -> None:
    logits, targets = problem(seed, rows, classes, ignore)
    expected = F.cross_entropy(logits, targets, ignore_index=ignore)
    torch.testing.assert_close(cross_entropy_explicit(logits, targets, ignore), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross_entropy(logits, targets, ignore), expected, rtol=1e-12, atol=1e-12)


@quick
@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 999))
def test_logits_of_1e4_do_not_overflow(rows: int, classes: int, seed: int) -> None:
    logits, targets = problem(seed, rows, classes, scale=1e4)
    single = logits.float()
    loss = cross_entropy_explicit(single, targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, F.cross_entropy(single, targets), rtol=1e-6, atol=1e-6)


@quick
@given(st.integers(1, 20), st.integers(1, 12), st.floats(-1e4, 1e4), st.integers(0, 999))
def test_a_constant_added_to_all_logits_changes_nothing(rows: int, classes: int, shift: float, seed: int) -> None:
    logits, targets = problem(seed, rows, classes)
    moved = cross_entropy_explicit(logits + shift, targets)
    torch.testing.assert_close(moved, cross_entropy_explicit(logits, targets), rtol=1e-9, atol=1e-9)


@quick
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 999))
def test_even_odds_cost_the_logarithm_of_the_number_of_classes(rows: int, classes: int, seed: int) -> None:
    _, targets = problem(seed, rows, classes)
    even = torch.full((rows, classes), 7.0, dtype=torch.float64)
    assert float(cross_entropy_explicit(even, targets)) == pytest.approx(math.log(classes), abs=1e-12)


def test_the_gradient_is_the_softmax_minus_the_target_over_the_number_that_counts() -> None:
    logits, targets = problem(0, 9, 5)
    logits.requires_grad_()
    cross_entropy_explicit(logits, targets).backward()  # type: ignore[no-untyped-call]
    kept = targets != -100
    expected = torch.zeros_like(logits)
    expected[kept] = torch.softmax(logits.detach()[kept], -1) - F.one_hot(targets[kept], 5)
    torch.testing.assert_close(logits.grad, expected / kept.sum())
    assert torch.autograd.gradcheck(lambda z: cross_entropy_explicit(z, targets), (logits,))


def test_takes_logits_and_targets_of_a_language_model() -> None:
    logits, targets = problem(1, 12, 5)
    whole = cross_entropy(logits.view(3, 4, 5).transpose(0, 1), targets.view(3, 4).t())
    torch.testing.assert_close(whole, cross_entropy_explicit(logits, targets))


@quick
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 999))
def test_token_losses_are_those_that_count_and_their_mean_is_the_loss(rows: int, classes: int, seed: int) -> None:
    logits, targets = problem(seed, rows, classes)
    logits.requires_grad_()
    losses = token_losses(logits, targets)
    kept = targets != -100
    assert not losses.requires_grad
    expected = -torch.log_softmax(logits.detach(), -1)[kept].gather(-1, targets[kept][:, None]).squeeze(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.mean(), cross_entropy(logits, targets).detach(), rtol=1e-12, atol=1e-12)

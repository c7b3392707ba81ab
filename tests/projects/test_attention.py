"""Attention: both paths against each other and against the formula; who may see what; what watching leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.projects.attention.component import Attention
from lab.sites import Site, sites_of

if TYPE_CHECKING:
    from collections.abc import Callable

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(0, 999))


def inputs(
    seed: int, batch: int, heads: int, length: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, width, generator=draw, dtype=dtype)
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with loops, one position at a time: no mask at all, only the positions that may be seen."""
    out = torch.empty_like(q)
    for t in range(q.shape[-2]):
        seen = slice(0, t + 1 + k.shape[-2] - q.shape[-2])
        scores = (q[..., t : t + 1, :] * k[..., seen, :]).sum(-1) / q.shape[-1] ** 0.5  # [B H s]
        out[..., t, :] = (torch.softmax(scores, -1)[..., None] * v[..., seen, :]).sum(-2)
    return out


@quick
@sizes
@example(2, 2, 1, 4, 0)
def test_both_paths_equal_the_formula_and_the_operator_of_torch(
    batch: int, heads: int, length: int, width: int, seed: int
) -> None:
    q, k, v = inputs(seed, batch, heads, length, width)
    made, expected = Attention(), formula(q, k, v)
    for answer in (
        made(q, k, v),
        made.explicit(q, k, v),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)


@quick
@sizes
def test_both_paths_agree_in_single_precision_and_in_their_gradients(
    batch: int, heads: int, length: int, width: int, seed: int
) -> None:
    made, gradients = Attention(), []
    for path in (made, made.explicit):
        qkv = [x.requires_grad_() for x in inputs(seed, batch, heads, length, width, torch.float32)]
        path(*qkv).square().sum().backward()
        gradients.append([x.grad for x in qkv])
    for fused, explicit in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (2, 5)])
def test_fewer_queries_than_keys_are_the_last_positions_on_both_paths(queries: int, keys: int) -> None:
    q, _, _ = inputs(0, 2, 2, queries, 4)
    _, k, v = inputs(1, 2, 2, keys, 4)
    made, expected = Attention(), formula(q, k, v)
    torch.testing.assert_close(made.explicit(q, k, v), expected)
    torch.testing.assert_close(made(q, k, v), expected)


@quick
@sizes
def test_rows_of_the_pattern_sum_to_1_and_none_of_it_lies_on_later_positions(
    batch: int, heads: int, length: int, width: int, seed: int
) -> None:
    made = Attention()
    with sites_of(made).capture("pattern") as seen:
        made.explicit(*inputs(seed, batch, heads, length, width))
    torch.testing.assert_close(seen["pattern"].sum(-1), torch.ones(batch, heads, length, dtype=torch.float64))
    assert (seen["pattern"] >= 0).all()
    assert not seen["pattern"].triu(1).any()


@quick
@given(st.integers(2, 40), st.integers(0, 999), st.data())
def test_a_later_key_or_value_moves_no_earlier_output_by_a_single_bit(
    length: int, seed: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(1, length - 1))
    q, k, v = inputs(seed, 2, 2, length, 8, torch.float32)
    made = Attention()
    for path in (made, made.explicit):
        moved_k, moved_v = k.clone(), v.clone()
        moved_k[..., place, :] += 3.0
        moved_v[..., place, :] *= -2.0
        before, after = path(q, k, v), path(q, moved_k, moved_v)
        assert torch.equal(before[..., :place, :], after[..., :place, :])
        assert not torch.equal(before[..., place:, :], after[..., place:, :])


def hide(*rows: int) -> Callable[[Tensor], Tensor]:
    def change(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[list(rows)] = False
        return mask

    return change


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_row_that_may_see_nothing_gives_0_and_finite_gradients(scale: float) -> None:
    made = Attention()
    sites_of(made).replace("mask", hide(0, 2))
    qkv = [(scale * x).requires_grad_() for x in inputs(0, 2, 2, 4, 64, torch.float32)]
    out = made(*qkv)
    assert not out[..., [0, 2], :].any()
    assert out[..., [1, 3], :].all()
    (scale * out.sum()).backward()
    for x in qkv:
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_the_first_position_sees_only_itself() -> None:
    q, k, v = inputs(0, 2, 2, 5, 4)
    for path in (Attention(), Attention().explicit):
        torch.testing.assert_close(path(q, k, v)[..., 0, :], v[..., 0, :])
        torch.testing.assert_close(path(q[..., :1, :], k[..., :1, :], v[..., :1, :]), v[..., :1, :])


def test_takes_inputs_that_are_not_contiguous() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(0, 2, 3, 5, 4))
    assert not q.is_contiguous()
    for path in (Attention(), Attention().explicit):
        torch.testing.assert_close(path(q, k, v), formula(q.contiguous(), k.contiguous(), v.contiguous()))


def test_scores_that_overflow_the_exponential_do_not_overflow_the_softmax() -> None:
    q, k, v = (x.float() for x in inputs(0, 2, 2, 6, 4))
    for path in (Attention(), Attention().explicit):
        out = path(1e3 * q, 1e3 * k, v)  # scores of about 1e6, where exp ends at 88
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out, formula(1e3 * q, 1e3 * k, v))


def test_gradients_of_the_explicit_path_are_those_of_finite_differences() -> None:
    qkv = tuple(x.requires_grad_() for x in inputs(0, 1, 2, 4, 3))
    assert torch.autograd.gradcheck(Attention().explicit, qkv)


# ---------------------------------------------------------------- who listens, and what that changes


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return inputs(0, 3, 2, 33, 8, torch.float32)


def test_the_two_paths_differ_in_some_bit_so_that_the_tests_below_tell_them_apart(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    assert not torch.equal(Attention()(*qkv), Attention().explicit(*qkv))


@pytest.mark.parametrize("name", ["mask", "scores", "pattern"])
def test_whoever_reads_inside_changes_no_bit_of_the_output_or_of_the_gradients(
    name: str, qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    made, seen = Attention(), []
    answers = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = made(*leaves)
        out.square().sum().backward()
        answers.append([out.detach(), *(x.grad for x in leaves)])
        sites_of(made).read(name, lambda _, value: seen.append(value))
    assert len(seen) == 1
    assert not seen[0].requires_grad
    for bare, watched in zip(*answers, strict=True):
        assert bare is not None
        assert watched is not None
        assert torch.equal(bare, watched)


def test_a_reader_is_shown_the_first_row_of_the_batch_as_the_explicit_path_has_it(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    made, sites = Attention(), sites_of(Attention())
    sites = sites_of(made)
    with sites.capture("*") as seen:
        made(*qkv)
    with sites.capture("*") as whole:
        made.explicit(*qkv)
    assert list(seen) == ["mask", "scores", "pattern"]
    torch.testing.assert_close(seen["scores"], whole["scores"][:1])
    torch.testing.assert_close(seen["pattern"], whole["pattern"][:1])
    assert torch.equal(seen["mask"], torch.ones(33, 33, dtype=torch.bool).tril())


def test_nothing_is_computed_aside_for_a_reader_that_is_not_due(
    qkv: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Attention()
    calls: list[Site] = []
    sites_of(made).read("pattern", lambda site, _: calls.append(site), lambda: False)
    monkeypatch.setattr(made, "explicit", lambda *_: pytest.fail("computed aside"))
    made(*qkv)
    assert not calls


@pytest.mark.parametrize("name", ["mask", "scores", "pattern"])
def test_an_active_writer_takes_the_explicit_path_and_its_value_counts(
    name: str, qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    made = Attention()
    explicit = made.explicit(*qkv)
    sites_of(made).replace(name, lambda value: value.clone())
    assert torch.equal(made(*qkv), explicit)
    sites_of(made).replace(name, torch.zeros_like)
    assert not torch.allclose(made(*qkv), explicit)


@pytest.mark.parametrize("name", ["mask", "scores", "pattern"])
def test_a_writer_that_is_not_yet_active_changes_no_bit(name: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    made, active = Attention(), False
    fused = made(*qkv)
    sites_of(made).replace(name, torch.zeros_like, lambda: active)
    assert torch.equal(made(*qkv), fused)
    active = True
    assert not torch.equal(made(*qkv), fused)


@pytest.mark.parametrize("name", ["scores", "pattern"])
def test_a_writer_of_the_gradient_takes_the_explicit_path_too(name: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    made, active = Attention(), False
    fused = made(*qkv)
    sites_of(made).replace(name, torch.zeros_like, lambda: active, grad=True)
    assert torch.equal(made(*qkv), fused)
    active = True
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    made(q, k, v).sum().backward()
    assert v.grad is not None
    assert v.grad.any()
    assert q.grad is not None
    assert not q.grad.any()

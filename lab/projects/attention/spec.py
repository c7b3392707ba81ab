"""What any scaled dot-product attention must do."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.sites import sites_of
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, normal, prop, seeds, tapped

batches, heads, lengths, widths = st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 8)


def _qkv(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    return tuple(normal(seed + i, *shape, dtype=dtype, scale=scale) for i in range(3))


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One position at a time, over only what it may see: no mask at all."""
    out = torch.empty_like(q)
    for t in range(q.shape[-2]):
        seen = slice(0, t + 1 + k.shape[-2] - q.shape[-2])
        scores = (q[..., t : t + 1, :] * k[..., seen, :]).sum(-1) / q.shape[-1] ** 0.5  # [B H s]
        out[..., t, :] = (torch.softmax(scores, -1)[..., None] * v[..., seen, :]).sum(-2)
    return out


@prop(
    "One position sees only itself, so its output is its own value: something is added, scaled or lost on the way.",
    seed=seeds,
    width=widths,
)
def a_single_position_gives_its_own_value(built: Built, seed: int, width: int) -> None:
    q, k, v = _qkv(seed, 1, 1, 1, width)
    equal(built.Attention()(q, k, v), v)
    equal(built.Attention().explicit(q, k, v), v, "explicit's output")


@prop(
    "An output moved when a later key or value did: the mask is missing, one off, or applied after the softmax.",
    seed=seeds,
    length=st.integers(2, 9),
    width=widths,
)
def no_output_depends_on_a_later_input(built: Built, seed: int, length: int, width: int) -> None:
    q, k, v = _qkv(seed, 1, 2, length, width)
    for name, path in (("forward", built.Attention()), ("explicit", built.Attention().explicit)):
        before = path(q, k, v)
        for place in range(1, length):
            moved_k, moved_v = k.clone(), v.clone()
            moved_k[..., place, :] += 3.0
            moved_v[..., place, :] -= 2.0
            after = path(q, moved_k, moved_v)
            equal(after[..., :place, :], before[..., :place, :], f"{name}'s output before position {place}")


@prop(
    "An output ignored an earlier position: the mask hides too much, or sits the wrong way round.",
    seed=seeds,
    length=st.integers(2, 9),
)
def every_output_depends_on_every_earlier_value(built: Built, seed: int, length: int) -> None:
    q, k, v = _qkv(seed, 1, 1, length, 4)
    for name, path in (("forward", built.Attention()), ("explicit", built.Attention().explicit)):
        for place in range(length):
            moved = v.clone()
            moved[..., place, :] += 1.0
            gap = (path(q, k, moved) - path(q, k, v))[..., place:, :].abs().amin()
            holds(gap > 0, f"{name}: value {place} moves not every output from {place} to {length - 1}")


@prop(
    "Values differ from softmax(q k^T / sqrt(D) + mask) v: look at the scale, the axis of the softmax, the transpose.",
    seed=seeds,
    batch=batches,
    count=heads,
    length=lengths,
    width=widths,
)
def equals_the_formula_and_torch(built: Built, seed: int, batch: int, count: int, length: int, width: int) -> None:
    q, k, v = _qkv(seed, batch, count, length, width)
    expected = _formula(q, k, v)
    equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected, "torch's own operator")
    equal(built.Attention().explicit(q, k, v), expected, "explicit's output")
    equal(built.Attention()(q, k, v), expected)


@prop(
    "With fewer queries than keys the queries are the last positions: the mask's diagonal begins at the wrong end.",
    seed=seeds,
    queries=st.integers(1, 4),
    more=st.integers(1, 4),
)
def fewer_queries_are_the_last_positions(built: Built, seed: int, queries: int, more: int) -> None:
    q, _, _ = _qkv(seed, 1, 2, queries, 4)
    _, k, v = _qkv(seed + 9, 1, 2, queries + more, 4)
    equal(built.Attention()(q, k, v), _formula(q, k, v))


@prop("A row of the pattern does not sum to 1, or has a negative weight: it is no average of the values.", seed=seeds)
def rows_sum_to_1(built: Built, seed: int) -> None:
    made = built.Attention()
    pattern = tapped(made, *_qkv(seed, 2, 2, 6, 4), call=made.explicit)["pattern"]
    equal(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), "the sum of a row of the pattern")
    holds((pattern >= 0).all(), f"the smallest weight is {float(pattern.min()):.3g}")


@prop(
    "Scores far above 88 gave inf or NaN: subtract each row's largest score before the exponential.",
    seed=seeds,
    scale=st.sampled_from([1.0, 30.0, 1e3]),
    dtype=floats,
)
def large_scores_stay_finite(built: Built, seed: int, scale: float, dtype: torch.dtype) -> None:
    q, k, v = _qkv(seed, 1, 2, 5, 4, dtype=torch.float64)
    largest = 60_000.0 if dtype == torch.float16 else 1e30  # what the dtype itself can hold
    scale = min(scale, (largest / 200) ** 0.5)
    q, k, v = (scale * q).to(dtype), (scale * k).to(dtype), v.to(dtype)
    out = built.Attention().explicit(q, k, v)
    holds(out.dtype == dtype, f"explicit's output is {out.dtype}, the inputs are {dtype}")
    holds(torch.isfinite(out).all(), f"explicit's output is not finite for scores of about {scale**2:.0f}")


@prop("A position that may see nothing must give 0, with finite gradients: 0/0 makes NaN of the whole row.", seed=seeds)
def a_fully_masked_row_is_0(built: Built, seed: int) -> None:
    made = built.Attention()

    def hide(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[[0, 2]] = False
        return mask

    sites_of(made).replace("mask", hide)
    leaves = [x.requires_grad_() for x in _qkv(seed, 1, 1, 4, 4)]
    out = made(*leaves)
    equal(out[..., [0, 2], :], torch.zeros_like(out[..., [0, 2], :]), "the output of the hidden rows")
    out.sum().backward()
    for name, leaf in zip("qkv", leaves, strict=True):
        holds(leaf.grad is not None and torch.isfinite(leaf.grad).all(), f"the gradient of {name} is not finite")


@prop(
    "Backward disagrees with the values: something is detached, or computed without gradient.", seed=seeds, examples=5
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    gradients(built.Attention().explicit, *_qkv(seed, 1, 2, 4, 3))


@prop("Memory order is no part of the values: a view was made where the layout does not allow it.", seed=seeds)
def takes_inputs_that_are_not_contiguous(built: Built, seed: int) -> None:
    qkv = [x.transpose(1, 2) for x in _qkv(seed, 2, 5, 3, 4)]  # [B H T D], strided
    equal(built.Attention()(*qkv), _formula(*(x.contiguous() for x in qkv)))


@prop(
    "Probes and faults find nothing at a site that is not tapped, or is tapped in another order.",
    seed=seeds,
    examples=3,
)
def taps_mask_scores_and_pattern(built: Built, seed: int) -> None:
    explicit_taps(built.Attention(), ("mask", "scores", "pattern"), *_qkv(seed, 1, 1, 3, 4))

"""AdamW and clipping against torch's own, and the shape of the learning-rate schedule."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lab.projects.backprop.component import AdamW, clip_gradients, learning_rate

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SHAPES = ((3, 4), (4,), (2, 2, 2), ())


def parameters(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def set_gradients(params: list[Tensor], seed: int, *, without: tuple[int, ...] = ()) -> None:
    draw = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        p.grad = None if i in without else grad


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": 3e-2, "weight_decay": 0.3},
        {"params": params[2:], "lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6},
    ]


def test_adamw_equals_torchs_over_100_steps_in_two_groups_and_with_a_parameter_without_gradient() -> None:
    ours, theirs = parameters(0), parameters(0)
    optimizers = (
        AdamW(groups(ours), betas=(0.9, 0.95)),
        torch.optim.AdamW(groups(theirs), betas=(0.9, 0.95), weight_decay=0.1),
    )
    untouched = ours[1].detach().clone()
    for step in range(100):
        late = () if step >= 30 else (3,)  # one parameter joins later: its bias correction starts then
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step, without=(1, *late))
            optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 100)
            optimizer.step()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=f"parameter {i}")
    assert torch.equal(ours[1], untouched)


@quick
@given(st.floats(1e-5, 1e-1), st.integers(0, 999))
def test_the_first_step_of_adamw_has_the_size_of_the_learning_rate(lr: float, seed: int) -> None:
    params = parameters(seed)
    before = [p.detach().clone() for p in params]
    set_gradients(params, seed + 1)
    AdamW(params, lr=lr, weight_decay=0.0).step()
    for p, old in zip(params, before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach() - old, -lr * p.grad.sign(), rtol=1e-4, atol=1e-9)


def test_the_decay_of_adamw_shrinks_a_weight_whose_gradient_is_zero() -> None:
    p = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 2.0 * (1 - 0.1 * 0.5)).detach())


def test_adamw_goes_on_from_its_saved_state() -> None:
    ours = parameters(0)
    optimizer = AdamW(groups(ours))
    for step in range(5):
        set_gradients(ours, step)
        optimizer.step()
    resumed = [p.detach().clone().requires_grad_() for p in ours]
    second = AdamW(groups(resumed))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(5, 8):
        for params, which in ((ours, optimizer), (resumed, second)):
            set_gradients(params, step)
            which.step()
    assert all(map(torch.equal, ours, resumed))


def test_adamw_calls_the_closure_with_gradients_on_and_returns_what_it_returns() -> None:
    p = torch.ones(2, requires_grad=True)

    def closure() -> float:
        p.square().sum().backward()  # type: ignore[no-untyped-call]
        return 42.0

    assert AdamW([p]).step(closure) == 42.0
    assert not torch.equal(p, torch.ones(2))


schedules = given(st.floats(1e-6, 10.0), st.integers(0, 50), st.integers(1, 400), st.floats(0.0, 1.0))


@quick
@schedules
def test_the_learning_rate_rises_to_its_peak_at_the_end_of_the_warmup_then_falls_to_its_floor_at_the_last_step(
    peak: float, warmup: int, total: int, floor: float
) -> None:
    assume(total >= warmup + 2)
    rates = [learning_rate(step, peak=peak, warmup=warmup, total=total, floor=floor) for step in range(total)]
    rounding = 1e-12 * peak
    top = max(0, warmup - 1)
    assert rates[top] == pytest.approx(peak, rel=1e-12)
    assert all(b > a for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(b <= a + rounding for a, b in itertools.pairwise(rates[top:]))
    assert rates[-1] == pytest.approx(floor * peak, abs=rounding)


@quick
@example(1.0, 0, 1, 0.1)
@example(1.0, 50, 1, 0.1)
@schedules
def test_the_learning_rate_is_never_above_its_peak_nor_negative_also_after_the_end(
    peak: float, warmup: int, total: int, floor: float
) -> None:
    rates = [learning_rate(step, peak=peak, warmup=warmup, total=total, floor=floor) for step in range(total + 50)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)


def test_the_learning_rate_halfway_down_is_halfway_between_peak_and_floor() -> None:
    # After 10 steps of warmup, steps 10 to 110: the middle is 60.
    assert learning_rate(60, peak=1.0, warmup=10, total=111, floor=0.2) == pytest.approx(0.6)
    assert learning_rate(35, peak=1.0, warmup=10, total=111, floor=0.0) == pytest.approx(0.5 + math.sqrt(0.125))


@quick
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sets(st.integers(0, 3), max_size=3), st.integers(0, 999))
def test_clipping_equals_torchs_and_returns_the_norm_before(
    limit: float, scale: float, without: set[int], seed: int
) -> None:
    ours, theirs = parameters(seed), parameters(seed)
    for params in (ours, theirs):
        set_gradients(params, seed, without=tuple(without))
        for p in params:
            if p.grad is not None:
                p.grad *= scale
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(clip_gradients(iter(ours), limit), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@quick
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_after_clipping_the_norm_is_at_most_the_limit_and_smaller_gradients_are_as_they_were(
    limit: float, scale: float, seed: int
) -> None:
    params = parameters(seed)
    set_gradients(params, seed)
    for p in params:
        assert p.grad is not None
        p.grad *= scale
    before = [p.grad.clone() for p in params if p.grad is not None]
    norm = float(clip_gradients(params, limit))
    after = [p.grad for p in params if p.grad is not None]
    joint = math.sqrt(sum(float(g.square().sum()) for g in after))
    assert joint <= limit * (1 + 1e-12)
    assert joint == pytest.approx(min(norm, limit), rel=1e-2)  # 1e-6 is added to the norm, which may be 1e-3
    if norm + 1e-6 <= limit:
        assert all(map(torch.equal, before, after))


def test_clipping_without_any_gradient_is_a_norm_of_zero_as_in_torch() -> None:
    assert float(clip_gradients(parameters(0), 1.0)) == float(torch.nn.utils.clip_grad_norm_(parameters(0), 1.0)) == 0.0

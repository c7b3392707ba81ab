"""How far rounding moves a run, measured by a perturbation of one unit in the last place, and what is allowed by it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.judging import judged
from lab.points import Point
from lab.stages import Stage
from lab.store import History, Row
from lab.tolerance import ALONE, FACTOR, HALF, NORMAL, Noise, Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

rounding = importlib.import_module("lab.probes.rounding")
other_rounding = rounding.other_rounding
FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FORMATS)
def test_each_result_is_moved_by_one_unit_up_or_down(dtype: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = x * 3
    with other_rounding([]):
        other = x * 3
    up = torch.nextafter(plain, torch.full_like(plain, torch.inf))
    down = torch.nextafter(plain, torch.full_like(plain, -torch.inf))
    assert bool(((other == up) | (other == down)).all())
    assert abs(float((other == up).double().mean()) - 0.5) < 4 * 0.5 / 4096**0.5


def test_what_is_equal_is_moved_alike_and_0_and_whole_numbers_and_views_are_not() -> None:
    x = torch.tensor([2.5, 2.5, 0.0, -1.0])
    with other_rounding([]):
        added, read, kept = x + 1.0, x.view(2, 2), torch.arange(4) + 1
        nothing = x * 0.0
        largest = torch.full((2,), torch.finfo(torch.float32).max) * x[:1].sign()
        made = torch.ones(3)
        hidden = torch.full((2,), torch.inf) * torch.tensor([1.0, -1.0])
    assert hidden.tolist() == [torch.inf, -torch.inf]
    assert added[0] == added[1] != 3.5
    assert torch.equal(read, x.view(2, 2))
    assert kept.tolist() == [1, 2, 3, 4]
    assert nothing.tolist() == [0.0] * 4
    assert bool(largest.isfinite().all())
    assert made.tolist() == [1.0] * 3


@pytest.mark.parametrize(("function", "count"), [(F.relu, 12), (F.gelu, None), (F.leaky_relu, 12)])
def test_functions_with_a_kink_are_counted(function: Callable[[torch.Tensor], torch.Tensor], count: int | None) -> None:
    x, kinks = torch.randn(3, 4, requires_grad=True), list[int]()
    with other_rounding(kinks):
        torch.autograd.grad(function(x).sum(), x)
    assert kinks == ([] if count is None else [count])


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
@pytest.mark.parametrize("kind", ["cross-entropy", "squares"])
def test_what_a_loss_sends_back_moves_no_further_than_is_said(kind: str, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    for sure in (0.1, 1.0, 10.0):  # how much the outputs are spread
        out = sure * torch.randn(64, 10, generator=draw, dtype=torch.float64)
        change = scale * torch.randn(64, 10, generator=draw, dtype=torch.float64)
        targets = torch.randint(10, (64,), generator=draw)

        def sent(out: torch.Tensor, targets: torch.Tensor = targets) -> torch.Tensor:
            out = out.clone().requires_grad_()
            squares = F.mse_loss(out, F.one_hot(targets, 10).double())
            return torch.autograd.grad(F.cross_entropy(out, targets) if kind == "cross-entropy" else squares, out)[0]

        first, other = sent(out), sent(out + change)
        moved = float((other - first).norm() / first.norm())
        said = float(rounding._sent_apart(change, first))
        assert moved <= said * 1.01
        assert said < 100 * moved or sure == 10.0  # it is a bound, and not just any


# ---------------------------------------------------------------- what is allowed


def measured(**rounding: float) -> Tolerance:
    """The tolerance between two runs, one of which measured these at step 0."""
    stages = {name: Stage(name, "rounding") for name in ("value", "loss", "gradient", "norm", "weight")}
    names = [
        ("loss", ALONE) if name == "alone" else ("gradient", "") if name == "sent" else (name, name)
        for name in rounding
    ]
    history = History(stages={name: stages[name] for name, _ in names})
    history.add(0, Row(tuple(names), torch.tensor([*rounding.values()], dtype=torch.float64).numpy()))
    tolerance = Tolerance(Noise((history, History())))
    tolerance.begin(0)
    return tolerance


def test_a_float32_sum_is_allowed_its_order_and_a_half_precision_one_only_its_projection() -> None:
    assert measured(value=1e-7).of("value", "value") == pytest.approx(FACTOR * 1e-7)
    half = 2.0**-8  # of bfloat16
    assert measured(value=half).of("value", "value") == pytest.approx(max(NORMAL * half, FACTOR * HALF))
    assert measured(value=half).of("value", "value") < FACTOR * half


def test_a_loss_of_equal_outputs_is_held_to_its_own_rounding() -> None:
    judge = measured(loss=1e-4, alone=1e-7)
    judge.saw("value", "out", 0.0)
    assert judge.of("loss", "loss") == pytest.approx(FACTOR * 1e-7)
    judge.saw("value", "out", 1e-7)
    assert judge.of("loss", "loss") == pytest.approx(FACTOR * 1e-4)


def test_gradients_may_move_by_what_the_loss_sends_only_where_outputs_moved() -> None:
    judge = measured(gradient=1e-7, sent=1e-4)
    judge.saw("value", "out", 0.0)
    assert judge.of("gradient", "gradient") == pytest.approx(FACTOR * 1e-7)
    judge.saw("value", "out", 1e-7)
    assert judge.of("gradient", "gradient") == pytest.approx(FACTOR * 1e-4)


def test_a_number_that_rounding_may_have_moved_by_half_of_itself_tells_nothing() -> None:
    assert measured(value=0.1).of("value", "value") == pytest.approx(0.4)
    assert measured(value=0.2).of("value", "value") == float("inf")


def updates(*apart: float, gradients: float = 1e-7) -> list[bool]:
    """Whether each weight differs after an update in which rounding may have turned an element of each around."""
    names = [f"{i}.weight" for i in range(len(apart))]
    stages = {
        "weight": Stage("weight", "rounding"),
        "drift": Stage("weight", "drift"),
        "flip": Stage("update", "rounding"),
        "gradient": Stage("gradient", "rounding"),
    }
    keys = [(metric, name) for metric in stages for name in names]
    known = {"weight": 1e-7, "drift": 1e-6, "flip": 1e-2, "gradient": 1e-7}
    history = History(stages=stages)
    history.add(0, Row(tuple(keys), torch.tensor([known[metric] for metric, _ in keys], dtype=torch.float64).numpy()))
    judge = Tolerance(Noise((history, History())))
    found = [Point(0, "gradient", "g", name, 1.0, 1.0, gradients) for name in names]
    found += [Point(0, "update", "w", name, 1.0, 1.0, distance) for name, distance in zip(names, apart, strict=True)]
    (step,) = judged(iter(found), judge)
    return [point.differs for point in step if point.part == "update"]


def test_in_a_single_weight_rounding_may_turn_an_element_around() -> None:
    assert updates(1e-6, 1e-3, 1e-6) == [False, False, False]
    assert updates(1e-6, 1e-1, 1e-6) == [False, True, False]  # that is more than one element
    assert updates(1e-6, 1e-3, 1e-3) == [False, True, True]  # in two weights at once it is no chance
    assert updates(1e-6, 1e-3, 1e-6, gradients=0.0) == [False, True, False]  # nothing was rounded otherwise


def test_a_network_in_another_order_of_sums_stays_within_what_was_measured() -> None:
    """The measure itself: the same matrices multiplied in blocks, the largest of many projections."""
    draw, width = torch.Generator().manual_seed(0), 512
    layers = [nn.Linear(width, width) for _ in range(3)]
    x = torch.randn(32, width, generator=draw)

    def forward(blocks: int) -> torch.Tensor:
        y = x
        for layer in layers:
            parts = zip(torch.chunk(y, blocks, 1), torch.chunk(layer.weight, blocks, 1), strict=True)
            y = torch.tanh(sum((part @ weight.T for part, weight in parts), torch.zeros(())) + layer.bias)
        return y

    with torch.no_grad():
        whole, blocks = forward(1), forward(16)
        with other_rounding([]):
            other = forward(1)
    noise = float((other - whole).norm() / whole.norm())
    assert 0 < float((blocks - whole).norm() / whole.norm()) < FACTOR * noise

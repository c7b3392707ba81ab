"""Gradients that are swept away, and updates that are not made, are named; loops that do so rightly are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.store import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

RULES = ("arrival.none", "update.calls")


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"layers": 0, "width": 16, "heads": 1, "context": 8}, "train": {"accumulate": 2}},
        {"train": {"lr": 0.0, "warmup": 0}},
        {"train": {"objective": "masked", "accumulate": 4, "clip": 1e-3}},
        {"model": {"layers": 1, "width": 32, "heads": 2, "context": 16, "tied": True, "mixer": "lstm"}},
    ],
)
def test_a_run_as_it_should_be_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert set(RULES) <= set(diagnosis.checked)
    assert named(diagnosis) == []
    assert set(history.series("update.calls").values) == {1.0}


@pytest.mark.parametrize("from_step", [0, 10])
@pytest.mark.parametrize("id", ["loop.zero_grad_late", "loop.no_step"])
def test_each_fault_is_named(small_run: SmallRun, id: str, from_step: int) -> None:
    diagnosis, history = small_run(faults=[{"id": id, "from_step": from_step}], steps=34, train={"accumulate": 2})
    assert [(c.id, c.at) for c in diagnosis.causes] == [(id, "loop")]
    assert diagnosis.causes[0].since_step == from_step
    assert diagnosis.unexplained == ()
    metric, healthy = ("arrival.share", 1.0) if id == "loop.zero_grad_late" else ("update.calls", 1.0)
    series = history.series(metric)
    assert np.array_equal(series.values, np.where(series.steps < from_step, healthy, 0.0))


# ---------------------------------------------------------------- anybody's loop

Model = nn.Module
Optimizer = torch.optim.Optimizer


def loss_of(model: Model) -> torch.Tensor:
    x = torch.randn(16, 6)
    return F.cross_entropy(model(x), x[:, :5].argmax(-1))


def plain(model: Model, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def update_first(model: Model, optimizer: Optimizer) -> None:
    """A loop cut at another place: the first update finds nothing, all others the gradients of the step before."""
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()  # type: ignore[no-untyped-call]


def closure(model: Model, optimizer: Optimizer) -> None:
    """As LBFGS is called: gradients are made within the update."""

    def again() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(again)


def accumulated(model: Model, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    for _ in range(3):
        (loss_of(model) / 3).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def swept(model: Model, optimizer: Optimizer) -> None:
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def train(folder: Path, step: Callable[[Model, Optimizer], None], *, master: bool = False) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    held = [nn.Parameter(p.detach().clone()) for p in model.parameters()] if master else list(model.parameters())
    optimizer = torch.optim.SGD(held, lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(34):
            if master:  # gradients are moved to copies that are updated, and weights back
                loss_of(model).backward()  # type: ignore[no-untyped-call]
                for copy, p in zip(held, model.parameters(), strict=True):
                    copy.grad, p.grad = p.grad, None
                optimizer.step()
                for copy, p in zip(held, model.parameters(), strict=True):
                    p.data.copy_(copy)
            else:
                step(model, optimizer)
    return watch.diagnosis


@pytest.mark.parametrize("step", [plain, update_first, closure, accumulated])
def test_other_loops_are_silent(tmp_path: Path, step: Callable[[Model, Optimizer], None]) -> None:
    assert named(train(tmp_path / "run", step)) == []


def test_copies_that_are_updated_are_silent(tmp_path: Path) -> None:
    assert named(train(tmp_path / "run", plain, master=True)) == []


def test_a_loop_that_sweeps_too_soon_is_named(tmp_path: Path) -> None:
    diagnosis = train(tmp_path / "run", swept)
    assert [(c.id, c.at) for c in diagnosis.causes] == [("loop.zero_grad_late", "loop")]


class Product(nn.Module):
    """A matrix as the product of two, of which the second is 0: it is all that the gradient of the first is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        nn.init.zeros_(self.up.weight)
        self.up.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.up(self.down(x)) + x[:, :5]
        return answer


def test_gradients_that_are_0_when_they_arrive_were_cleared_by_nobody(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Product()
    optimizer = torch.optim.AdamW(model.down.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(24):
            plain(model, optimizer)
    assert named(watch.diagnosis) == []
    assert "0 there" in watch.diagnosis.not_checked["arrival.none"]


class Ended(nn.Module):
    """A regression that ends with a ReLU, as a module or as a function; `bias` is that of the layer before."""

    def __init__(self, bias: float, *, module: bool = True) -> None:
        super().__init__()
        self.body, self.out, self.relu = nn.Linear(6, 16), nn.Linear(16, 1), nn.ReLU()
        self.module = module
        nn.init.constant_(self.out.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(torch.tanh(self.body(x)))
        answer: torch.Tensor = self.relu(y) if self.module else y.clamp_min(0)
        return answer


def regress(folder: Path, model: Ended, target: float) -> lab.Diagnosis:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(34):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            F.l1_loss(model(x).squeeze(-1), x[:, 0].square() * target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize(("module", "at"), [(True, "relu"), (False, "model")])
def test_an_output_that_is_dead_is_named(tmp_path: Path, module: bool, at: str) -> None:
    torch.manual_seed(0)
    diagnosis = regress(tmp_path / "run", Ended(-9.0, module=module), 1.0)
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [("head.dead", at, 0)]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize(("bias", "target"), [(1.0, 1.0), (-0.2, 1.0), (-9.0, 0.0)])  # the last has nothing to learn
def test_a_relu_at_the_end_is_silent_while_some_row_passes(tmp_path: Path, bias: float, target: float) -> None:
    torch.manual_seed(0)
    assert regress(tmp_path / "run", Ended(bias), target).causes == ()


@pytest.mark.parametrize(
    ("share", "output", "calls", "found"),
    [
        ([1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], ["arrival.none"]),
        ([1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], []),  # nothing was sent
        ([0, 0, 0, 0.1], [1, 1, 1, 1], [1, 1, 1, 1], []),  # a part is frozen
        ([1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], ["update.calls"]),
        ([1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], []),
        ([float("nan")] * 4, [1, 1, 1, 1], [0, 0, 0, 0], []),
    ],
)
def test_the_rules(catalogue: Any, share: list[float], output: list[float], calls: list[float], found: Any) -> None:
    history = lab.History()
    names = ("arrival.share", "arrival.output", "arrival.reached", "update.calls")
    columns = tuple((name, "") for name in names)
    for step, values in enumerate(zip(share, output, output, calls, strict=True)):
        history.add(step, Row(columns, np.array(values, dtype=float)))
    seen = []
    for name in RULES:
        try:
            seen += [name for _ in catalogue.rules[name].judge(history)]
        except lab.NotChecked:
            continue
    assert seen == found

"""Optimisers: silent on those that hold, remember and go by what they should, in any of the ways that others do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lab
from lab.attach.watch import watch
from lab.diagnosis.diagnose import judge
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

    from lab import Run
    from lab.catalogue import Catalogue

    Make = Callable[[nn.Module], torch.optim.Optimizer]


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith(("optimizer.", "movement."))]


@lab.plugin("test.holder", title="Keeps the run")
class Holder(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.run = run
        self.groups = [(group["params"], group["betas"]) for group in run.optimizer.param_groups]


@pytest.mark.parametrize(
    ("fault", "since"),
    [
        ({"id": "optimizer.stale_parameters"}, 0),
        ({"id": "optimizer.state_lost", "from_step": 13}, 13),
        ({"id": "optimizer.bad_betas"}, 0),
        ({"id": "optimizer.bad_betas", "beta1": 0.95, "beta2": 0.05}, 0),
    ],
)
def test_each_fault_is_named_and_undone(small_run: SmallRun, fault: dict[str, Any], since: int) -> None:
    holder = Holder()
    diagnosis, _ = small_run(holder, faults=[fault], steps=24)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [(fault["id"], "optimizer", since)]
    assert diagnosis.unexplained == ()
    assert holder.run.held == {id(p) for p in holder.run.model.parameters()}
    assert all(group["betas"] == (0.9, 0.95) for group in holder.run.optimizer.param_groups)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"lr": 1e-6, "warmup": 0}},
        {"train": {"accumulate": 2, "lora_rank": 2}},
        {"model": {"layers": 1, "width": 16, "heads": 1, "context": 8, "tied": True, "mixer": "gru"}},
    ],
)
def test_healthy_runs_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert named(diagnosis) == []
    rules = {"optimizer.stale", "optimizer.forgot", "optimizer.betas", "optimizer.rate_zero"}
    assert rules <= set(diagnosis.checked)
    assert history.last("optimizer.count") == 12


class Masters(torch.optim.SGD):
    """Holds copies, as mixed precision with master weights does: gradients come before a step, values go after it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = list(model.parameters())
        super().__init__([nn.Parameter(p.detach().clone()) for p in self.model], lr=0.1)
        self.register_step_pre_hook(self.take)
        self.register_step_post_hook(self.give)

    def take(self, *_: Any) -> None:
        for p, master in zip(self.model, self.param_groups[0]["params"], strict=True):
            master.grad = None if p.grad is None else p.grad.clone()

    def give(self, *_: Any) -> None:
        for p, master in zip(self.model, self.param_groups[0]["params"], strict=True):
            p.data.copy_(master.data)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.model:
            p.grad = None


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())} for layer in model.children()]
    groups[0]["lr"] = 0.0
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)  # type: ignore[index]
    return torch.optim.NAdam(model.parameters(), lr=torch.tensor(1e-2))


def stale(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p.detach().clone().requires_grad_() for p in model.parameters()], lr=1e-2)


def watched(folder: Path, make: Make, each: Callable[[int, torch.optim.Optimizer], None]) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = make(model)
    with watch(model, optimizer, out=folder) as watching:
        for step in range(34):
            each(step, optimizer)
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    return watching.diagnosis


@pytest.mark.parametrize(
    "make",
    [
        Masters,
        two_groups,
        frozen,
        lambda m: torch.optim.AdamW(m.parameters(), betas=(0.5, 0.5), lr=1e-2),
        lambda m: torch.optim.Adam(m.parameters(), betas=(0.0, 0.9), lr=1e-2),
        lambda m: torch.optim.Adam(m.parameters(), betas=(0.95, 0.9), lr=1e-2, amsgrad=True),
        lambda m: torch.optim.Adagrad(m.parameters()),
        lambda m: torch.optim.RMSprop(m.parameters()),
    ],
)
def test_what_others_do_rightly_is_silent(tmp_path: Path, make: Make) -> None:
    assert named(watched(tmp_path / "run", make, lambda *_: None)) == []


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def again_and_again(step: int, optimizer: torch.optim.Optimizer) -> None:
    if step % 8 == 7:
        optimizer.state.clear()


def warmed_up(step: int, optimizer: torch.optim.Optimizer) -> None:
    if step == 15:
        optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step % 15 + 1) / 5)


def once(step: int, optimizer: torch.optim.Optimizer) -> None:
    if step == 15:
        optimizer.state.clear()


@pytest.mark.parametrize(
    ("make", "each", "expected"),
    [
        (adam, again_and_again, []),
        (adam, warmed_up, []),
        (adam, once, ["optimizer.state_lost"]),
        (stale, lambda *_: None, ["optimizer.stale_parameters"]),
        (lambda m: torch.optim.Adam(m.parameters(), betas=(0.999, 0.9)), lambda *_: None, ["optimizer.bad_betas"]),
    ],
)
def test_what_is_done_on_purpose_is_told_from_what_is_lost(
    tmp_path: Path, make: Make, each: Callable[..., None], expected: list[str]
) -> None:
    diagnosis = watched(tmp_path / "run", make, each)
    assert [cause.id for cause in diagnosis.causes] == expected
    assert diagnosis.unexplained == ()


COLUMNS = (("optimizer.count", ""), ("optimizer.rate", ""))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 11, 21, 31], set()),
        ([1, 11, 1, 11], {"optimizer.forgot"}),
        ([1, 11, float("nan"), 31], set()),
        ([1, 1, 1, 1], set()),  # it does not count
        ([11, 1, 11, 1], set()),
    ],
)
def test_only_a_count_that_falls_once_is_a_loss(catalogue: Catalogue, counts: list[float], expected: set[str]) -> None:
    history = History()
    for index, count in enumerate(counts):
        history.add(10 * index, Row(COLUMNS, np.array([count, 1e-3])))
    assert {s.id for s in judge(history, catalogue)[0]} == expected

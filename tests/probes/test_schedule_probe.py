"""The schedule: silent where it is stepped once for each update, in any of its ways, and right where it is not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import lab
from lab.attach.watch import watch
from lab.diagnosis.diagnose import judge
from lab.projects.backprop.component import learning_rate
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

Loop = tuple["Callable[[int], None]", Any]


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith(("schedule.", "optimizer."))]


@pytest.mark.parametrize(
    "changes",
    [{"train": {"warmup": 0}}, {"train": {"accumulate": 4, "warmup": 100}}, {"train": {"lora_rank": 2}, "steps": 2}],
)
def test_healthy_runs_are_silent_and_go_by_the_schedule(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**{"steps": 12, **changes})
    assert named(diagnosis) == []
    total, warmup = history.last_step + 1, changes["train"].get("warmup", 10)
    rates = [learning_rate(step, peak=3e-3, warmup=warmup, total=total) for step in range(total)]
    for metric in ("schedule.set", "schedule.said", "optimizer.rate", "learning_rate"):
        assert history.series(metric).values.tolist() == rates
    assert history.series("schedule.count").values.tolist() == list(range(total))


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("schedule.per_part", {"train": {"accumulate": 4}}),
        ("schedule.never_stepped", {}),
        ("schedule.never_stepped", {"train": {"warmup": 0}}),
        ("schedule.not_applied", {}),
        ("schedule.rate_zero", {}),
    ],
)
def test_each_fault_is_named(small_run: SmallRun, id: str, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[{"id": id}], **changes)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "schedule")]
    assert diagnosis.unexplained == ()


def test_a_batch_in_one_part_has_no_other_place_to_step(small_run: SmallRun) -> None:
    with pytest.raises(lab.BadInput, match="in one part"):
        small_run(faults=[{"id": "schedule.per_part"}])


def watched(folder: Path, make: Callable[[torch.optim.Optimizer], Loop], steps: int = 24) -> lab.Diagnosis:
    """A loop of anybody's; `make` gives what it calls after each update, and the scheduler that the lab is told of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    after, scheduler = make(optimizer)
    with watch(model, optimizer, out=folder, scheduler=scheduler) as watching, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            after(step)
    return watching.diagnosis


def once(make: Callable[..., Any], **options: Any) -> Callable[[torch.optim.Optimizer], Loop]:
    def made(optimizer: torch.optim.Optimizer) -> Loop:
        scheduler = make(optimizer, **options)
        return lambda _: scheduler.step(), scheduler

    return made


def chained(optimizer: torch.optim.Optimizer) -> Loop:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    second = lr_scheduler.ExponentialLR(optimizer, 0.9)

    def after(_step: int) -> None:
        first.step()
        second.step()

    return after, first


def fractions(optimizer: torch.optim.Optimizer) -> Loop:
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10)
    return lambda step: scheduler.step(step / 100), scheduler


def constant(optimizer: torch.optim.Optimizer) -> Loop:
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    return lambda _: scheduler.step(), scheduler


def plateau(optimizer: torch.optim.Optimizer) -> Loop:
    return lambda _: None, lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        once(lr_scheduler.LambdaLR, lr_lambda=lambda step: step / 30),  # from 0
        once(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=100),
        once(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
        lambda o: once(
            lr_scheduler.SequentialLR,
            schedulers=[lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 12)],
            milestones=[5],
        )(o),
        chained,
        fractions,
        constant,
        plateau,
        lambda _: (lambda _: None, None),
    ],
)
def test_what_others_do_rightly_is_silent(tmp_path: Path, make: Callable[..., Loop]) -> None:
    assert named(watched(tmp_path / "run", make)) == []


def test_of_no_schedule_nothing_is_said(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", lambda _: (lambda _: None, None))
    assert "no scheduler is known" in diagnosis.not_checked["schedule.never_stepped"]


def forgotten(optimizer: torch.optim.Optimizer) -> Loop:
    return lambda _: None, lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


def of_another(optimizer: torch.optim.Optimizer) -> Loop:
    other = torch.optim.AdamW([group["params"][0] for group in optimizer.param_groups], lr=1e-2)
    return once(lr_scheduler.CosineAnnealingLR, T_max=24)(other)


def three_times(optimizer: torch.optim.Optimizer) -> Loop:
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 100)

    def after(_step: int) -> None:
        for _ in range(3):
            scheduler.step()

    return after, scheduler


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (forgotten, "schedule.never_stepped"),
        (of_another, "schedule.not_applied"),
        (three_times, "schedule.per_part"),
        (once(lr_scheduler.LambdaLR, lr_lambda=lambda step: step // 100), "schedule.rate_zero"),
    ],
)
def test_each_mistake_in_anybodys_loop_is_named(tmp_path: Path, make: Callable[..., Loop], cause: str) -> None:
    diagnosis = watched(tmp_path / "run", make)
    assert [found.id for found in diagnosis.causes] == [cause]
    assert diagnosis.unexplained == ()


def by_epoch(start: float, updates: int = 12) -> Callable[[torch.optim.Optimizer], Loop]:
    """A warmup over epochs of so many updates."""

    def make(optimizer: torch.optim.Optimizer) -> Loop:
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: start + epoch / 4)
        return lambda step: scheduler.step() if step % updates == updates - 1 else None, scheduler

    return make


def waits(optimizer: torch.optim.Optimizer) -> Loop:
    """Stepped after each update, and 0 for the first twelve: so it was written down."""
    return once(lr_scheduler.LambdaLR, lr_lambda=lambda step: float(step > 11))(optimizer)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(by_epoch(0.0), ["schedule.rate_zero"]), (by_epoch(0.25), []), (by_epoch(0.0, 4), []), (waits, [])],
)
def test_a_first_epoch_without_a_rate(tmp_path: Path, make: Callable[..., Loop], expected: list[str]) -> None:
    diagnosis = watched(tmp_path / "run", make, steps=36)
    assert [(found.id, found.since_step) for found in diagnosis.causes] == [(id, 0) for id in expected]
    assert diagnosis.unexplained == ()


def test_a_rate_that_stays_0_as_nobody_steps_its_schedule(tmp_path: Path) -> None:
    make = lambda o: (lambda _: None, lr_scheduler.LambdaLR(o, lambda step: step / 100))  # noqa: E731
    diagnosis = watched(tmp_path / "run", make)
    assert [found.id for found in diagnosis.causes] == ["schedule.never_stepped"]
    assert diagnosis.unexplained == ()


COLUMNS = tuple((f"schedule.{name}", "") for name in ("set", "said", "count", "processes", "by_update"))


def found(catalogue: Catalogue, rows: list[tuple[float, float, float, float]], by_update: float = 1.0) -> set[str]:
    history = History()
    for index, (rate, said, count, processes) in enumerate(rows):
        history.add(index, Row(COLUMNS, np.array([rate, said, count, processes, by_update])))
    return {s.id for s in judge(history, catalogue)[0]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 1.0, 0, 1)] * 9, set()),  # too few
        ([(1.0, 1.0, 0, 1)] * 10, {"schedule.never_stepped"}),
        ([(1.0, 1.0, 0, 1)] * 10 + [(0.9, 0.9, 1, 1)], set()),  # it begins late
        ([(1.0 / (1 + i), 1.0 / (1 + i), i + 5 * (i > 3), 1) for i in range(12)], set()),  # updates were skipped once
        ([(1.0 / (1 + i), 1.0 / (1 + i), 2 * i, 1) for i in range(12)], {"schedule.stepped_often"}),
        ([(1.0 / (1 + i), 1.0 / (1 + i), 2 * i, 2) for i in range(12)], set()),  # once for each process
        ([(1.0, 1.0 / (1 + i), i, 1) for i in range(12)], {"schedule.not_applied"}),
        ([(0.5 / (1 + i), 1.0 / (1 + i), i, 1) for i in range(12)], set()),  # another has the last word
        ([(float("nan"), float("nan"), i, 1) for i in range(12)], set()),
    ],
)
def test_what_is_wrong_with_a_schedule(
    catalogue: Catalogue, rows: list[tuple[float, float, float, float]], expected: set[str]
) -> None:
    assert found(catalogue, rows) == expected


def test_a_schedule_that_may_count_epochs_can_stand_still(catalogue: Catalogue) -> None:
    assert found(catalogue, [(1.0, 1.0, 0, 1)] * 10, by_update=0.0) == set()

"""When a run is examined and judged."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import lab
from lab import session
from lab.catalogue import Catalogue
from lab.context import Step

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from conftest import SmallRun

    from lab import Run


@lab.plugin("when", title="Keeps which steps are examined")
class When(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.steps: list[int] = []

    def lab_step_end(self, run: Run, step: Step) -> None:
        if step.examined:
            self.steps.append(step.index)


def test_a_healthy_run_is_examined_more_and_more_seldom(small_run: SmallRun) -> None:
    when = When()
    small_run(when, probes=False, steps=140, data={"source": "markov", "batch": 2})
    assert when.steps == [0, 10, 20, 30, 45, 67, 100, 139]


def test_a_suspicion_calls_for_a_look_at_the_next_step_and_is_told_after_three(small_run: SmallRun) -> None:
    when = When()
    diagnosis, _ = small_run(when, faults=[{"id": "targets.not_shifted", "from_step": 7}], steps=24)
    # The symptom is new at 12: one look more. Its own date is that of the first look that shows it.
    assert when.steps[1:5] == [10, 11, 12, 13]
    assert [(cause.id, cause.since_step) for cause in diagnosis.causes] == [("targets.not_shifted", 10)]


@lab.probe("dear", title="Keeps when it is asked", examines=True, seldom=True)
class Dear(lab.Probe):
    def lab_start(self, run: Run) -> None:
        self.steps: list[int] = []

    def lab_examine(self, run: Run, step: Step) -> None:
        self.steps.append(step.index)


def test_what_costs_much_is_made_seldom_and_where_something_is_suspected(small_run: SmallRun) -> None:
    dear = Dear()
    small_run(dear, steps=140, data={"source": "markov", "batch": 2})
    assert dear.steps == [0, 10, 30, 100, 139]
    dear = Dear()
    small_run(dear, faults=[{"id": "targets.not_shifted", "from_step": 35}], steps=50)
    assert dear.steps == [0, 10, 30, 46, 47, 48, 49]


def test_each_doubling_of_a_long_run_is_examined_as_often(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path, steps=None)
    watching = session.Session(run, Catalogue())
    looks, dear = [], []
    for index in range(80_000):
        step = Step(index)
        watching.begin_step(step)
        looks += [index] if step.examined else []
        dear += [index] if step.thorough else []
    watching.store.close()
    assert {b - a for a, b in pairwise(looks) if a > 300 and b <= session.WHOLE} == {100}
    for begin in (10_000, 20_000, 40_000):
        assert 49 <= sum(begin <= index < 2 * begin for index in looks) <= 51
        assert 12 <= sum(begin <= index < 2 * begin for index in dear) <= 13


def test_of_a_long_run_fewer_and_fewer_steps_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice as many steps are half as many rows more; what is not finite, and what is examined, is kept always."""
    monkeypatch.setattr(session, "WHOLE", 16)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given: list[int] = []

    @lab.plugin("counts", title="Counts the rows that it is given")
    class Counts(lab.Plugin):
        def lab_metrics(self, step: Step) -> None:
            given.append(step.index)

    watching = lab.watch(model, optimizer, out=tmp_path / "run", plugins=[Counts()], probes=["loss"], examine_every=64)
    with watching:
        for step in range(256):
            optimizer.zero_grad()
            loss = model(torch.randn(3, 4)).square().mean() * (float("inf") if step == 201 else 1.0)
            loss.backward()
            for p in model.parameters():
                p.grad = None if step == 201 else p.grad
            optimizer.step()
    kept = watching.run.history.series("loss").steps.tolist()
    examined = {0, 32, 64, 128, 192, 202, 255}
    thinned = {s for s in range(256) if s < 16 or s % 2 ** (s // 16).bit_length() == 0}
    assert thinned | {201} <= set(kept) <= thinned | {201} | examined
    assert sorted(set(given)) == list(range(256))
    assert lab.load(tmp_path / "run").history.series("loss").steps.tolist() == kept

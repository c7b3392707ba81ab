"""Checks of references: silent where there is none, and where it is a copy of its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import lab
from lab.context import Batch, Run, Step
from lab.errors import NotChecked
from lab.manager import Manager
from lab.projects.alignment.component import frozen_copy
from lab.store import History, Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.preferences")


class Holder(lab.Plugin):
    def __init__(self, reference: torch.nn.Module) -> None:
        self.reference = reference


def examined(tmp_path: Path, policy: torch.nn.Module, reference: torch.nn.Module, move: float = 0.0) -> History:
    run = Run(tmp_path, Manager())
    run.attach(policy, torch.optim.SGD(policy.parameters(), lr=0.1), run.sites)
    run.plugins.add(Holder(reference))
    probe = probes.Reference()
    probe.lab_start(run)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(move)
    run.step = Step(0, batch=Batch((torch.zeros(1),)))
    probe.lab_examine(run, run.step)
    run.history.add(0, run.step.flush()[0])
    return run.history


def found(history: History) -> list[str]:
    rules = probes.reference_shared, probes.reference_moved
    return [rule.id for rule in rules for _ in rule.judge(history)]


def test_a_copy_that_stays_is_silent(tmp_path: Path) -> None:
    policy = torch.nn.Linear(3, 2)
    assert found(examined(tmp_path, policy, frozen_copy(policy))) == []


def test_the_policy_itself_is_no_reference(tmp_path: Path) -> None:
    policy = torch.nn.Linear(3, 2)
    assert found(examined(tmp_path, policy, policy, move=1.0)) == ["reference.shared"]


def test_frozen_weights_may_be_shared(tmp_path: Path) -> None:
    body = torch.nn.Linear(3, 2).requires_grad_(requires_grad=False)
    policy = torch.nn.Sequential(body, torch.nn.Linear(2, 2))
    assert found(examined(tmp_path, policy, torch.nn.Sequential(body, frozen_copy(policy[1])))) == []


def test_a_reference_that_moves_is_named(tmp_path: Path) -> None:
    policy = torch.nn.Linear(3, 2)
    assert found(examined(tmp_path, policy, frozen_copy(policy), move=1e-3)) == ["reference.moved"]


def test_without_a_reference_nothing_is_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(steps=2)
    for id in ("reference.shared", "reference.moved"):
        assert diagnosis.not_checked[id].endswith(probes.NONE)


def test_a_history_by_hand_is_dated_by_the_first_wrong_step() -> None:
    history = History()
    for step, moved in enumerate((0.0, 0.0, 1e-9)):
        row = Row((("reference.shared", ""), ("reference.moved", "")), np.array([0.0, moved]))
        history.add(step, row)
    assert [s.since for s in probes.reference_moved.judge(history)] == [2]
    with pytest.raises(NotChecked):
        [*probes.reference_moved.judge(History())]

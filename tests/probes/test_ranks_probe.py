"""Weights between processes: what is wrong, what is not, and what cannot be judged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lab import BadInput, History, NotChecked, Row

if TYPE_CHECKING:
    from conftest import SmallRun

ranks = importlib.import_module("lab.probes.ranks")
JUDGES = {"ranks.drifted": ranks.ranks_drift.judge, "ranks.gradients": ranks.ranks_gradients.judge}


def made(metric: str, alike: float, apart: list[float]) -> History:
    history = History()
    for step, value in enumerate(apart):
        history.add(step, Row((("ranks.alike", ""), (metric, "")), np.array([alike, value])))
    return history


@pytest.mark.parametrize(("drifted", "since"), [([0, 0, 0], None), ([0, 3, 3], 1), ([0, 0, 1], 2), ([0, 3, 0], None)])
@pytest.mark.parametrize("metric", JUDGES)
def test_apart_is_what_does_not_come_together_again(metric: str, drifted: list[float], since: int | None) -> None:
    found = [symptom.since for symptom in JUDGES[metric](made(metric, 1.0, drifted))]
    assert found == ([] if since is None else [since])


@pytest.mark.parametrize(("alike", "drifted"), [(1.0, [0.0]), (0.0, [0.0, 0.0]), (0.7, [0.0, 2.0])])
@pytest.mark.parametrize("metric", JUDGES)
def test_what_it_cannot_judge(metric: str, alike: float, drifted: list[float]) -> None:
    with pytest.raises(NotChecked, match=r"one look at the processes|cut between the processes"):
        list(JUDGES[metric](made(metric, alike, drifted)))


def test_one_process_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, history = small_run(steps=2)
    assert "one process" in diagnosis.not_checked["ranks.drift"]
    assert "ranks.drifted" not in history.metrics


def test_the_fault_needs_processes(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match="ranks above 1"):
        small_run(faults=[{"id": "distributed.no_sync"}], steps=2)

"""Weights between processes: what is wrong, what is not, and what cannot be judged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lab import BadInput, History, NotChecked, Row

if TYPE_CHECKING:
    from conftest import SmallRun

ranks_drift = importlib.import_module("lab.probes.ranks").ranks_drift


def made(alike: float, drifted: list[float]) -> History:
    history = History()
    for step, value in enumerate(drifted):
        history.add(step, Row((("ranks.alike", ""), ("ranks.drifted", "")), np.array([alike, value])))
    return history


@pytest.mark.parametrize(("drifted", "since"), [([0, 0, 0], None), ([0, 3, 3], 1), ([0, 0, 1], 2), ([0, 3, 0], None)])
def test_a_drift_is_what_does_not_come_back(drifted: list[float], since: int | None) -> None:
    found = [symptom.since for symptom in ranks_drift.judge(made(1.0, drifted))]
    assert found == ([] if since is None else [since])


@pytest.mark.parametrize(("alike", "drifted"), [(1.0, [0.0]), (0.0, [0.0, 0.0]), (0.7, [0.0, 2.0])])
def test_what_it_cannot_judge(alike: float, drifted: list[float]) -> None:
    with pytest.raises(NotChecked, match="fewer than two looks"):
        list(ranks_drift.judge(made(alike, drifted)))


def test_one_process_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, history = small_run(steps=2)
    assert "one process" in diagnosis.not_checked["ranks.drift"]
    assert "ranks.drifted" not in history.metrics


def test_the_fault_needs_processes(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match="ranks above 1"):
        small_run(faults=[{"id": "distributed.no_sync"}], steps=2)

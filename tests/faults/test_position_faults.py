"""What each fault of positions makes of the table."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

from lab.projects.positions.component import LearnedPositions
from lab.sites import sites_of

faults = importlib.import_module("lab.faults.positions")


def test_a_limit_repeats_its_last_row() -> None:
    table = torch.randn(6, 4)
    assert faults.Truncated(limit=3).change(table).equal(table[[0, 1, 2, 2, 2, 2]])
    assert faults.Truncated(limit=9).change(table).equal(table)


def test_off_by_one_repeats_the_first_row() -> None:
    table = torch.randn(4, 2)
    assert faults.OffByOne().change(table).equal(table[[0, 0, 1, 2]])


def test_no_positions_are_zeros_from_their_step_on() -> None:
    model = torch.nn.ModuleDict({"positions": LearnedPositions(4, 2)})
    run: Any = SimpleNamespace(model=model, sites=sites_of(model), step=SimpleNamespace(index=0))
    faults.NoPositions(from_step=3).lab_start(run)
    assert model["positions"](4).equal(model["positions"].weight)
    run.step.index = 3
    assert (model["positions"](4) == 0).all()

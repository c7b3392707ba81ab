"""Plugins: the order in which they act, what is refused, and what becomes of one that raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lab
from lab.errors import FaultFailed
from lab.manager import Manager, discover

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from conftest import SmallRun

    from lab import Run, Site, Step


@lab.plugin("keeper", title="Keeps the run and its final weights")
class Keeper(lab.Plugin):
    run: Run | None = None

    def lab_start(self, run: Run) -> None:
        self.run = run
        self.steps = 0

    def lab_step_end(self) -> None:
        self.steps += 1

    def lab_end(self, run: Run) -> None:
        self.weights = [p.detach().clone() for p in run.model.parameters()]

    @property
    def plugins(self) -> Manager:
        assert self.run is not None
        return self.run.plugins


def in_order(first: lab.Plugin, second: lab.Plugin, *, turned: bool) -> tuple[lab.Plugin, lab.Plugin]:
    return (second, first) if turned else (first, second)


def loss_of(step: Step) -> Tensor:
    assert step.logits is not None
    assert step.batch is not None
    assert step.batch.targets is not None
    return F.cross_entropy(step.logits.flatten(0, 1), step.batch.targets.flatten())


def test_fault(cls: type[Any]) -> Any:
    """Mark a fault of these tests."""
    return lab.fault(f"test.{cls.__name__.lower()}", title="", cause="", moves="loss", repair="")(cls)


test_fault.__test__ = False  # type: ignore[attr-defined]

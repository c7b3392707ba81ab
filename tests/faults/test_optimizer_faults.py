"""Optimisers that do not follow their formula: what each fault does to an update, exactly, and that it is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import FaultFailed

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run, Step

LR, DECAY, EPS = 1e-2, 0.1, 1e-8
TRAIN = {"lr": LR, "warmup": 0, "weight_decay": DECAY}


@lab.plugin("test.first", title="Keeps a weight and its gradient before the first update, and the weight after it")
class First(lab.Plugin):
    run: Run

    def lab_before_update(self, run: Run, step: Step) -> None:
        self.run = run
        if step.index == 0:
            p = run.parameters["head.weight"]
            assert p.grad is not None
            self.before, self.grad = p.detach().clone(), p.grad.clone()

    def lab_step_end(self, run: Run, step: Step) -> None:
        if step.index == 0:
            self.after, self.lr = run.parameters["head.weight"].detach().clone(), step.lr


def uncorrected(x: torch.Tensor, g: torch.Tensor, lr: float) -> torch.Tensor:
    b1, b2 = 0.9, 0.95
    size: torch.Tensor = (1 - b2) ** 0.5 * g.abs() + EPS
    return x * (1 - lr * DECAY) - lr * (1 - b1) * g / size


def coupled(x: torch.Tensor, g: torch.Tensor, lr: float) -> torch.Tensor:
    g = g + DECAY * x
    return x - lr * g / (g.abs() + EPS)


@pytest.mark.parametrize(
    ("id", "formula"), [("optimizer.no_bias_correction", uncorrected), ("optimizer.coupled_decay", coupled)]
)
def test_the_first_update_is_that_of_the_wrong_formula(small_run: SmallRun, id: str, formula: Any) -> None:
    first = First()
    diagnosis, _ = small_run(first, faults=[{"id": id}], train=TRAIN, steps=3)
    assert first.lr is not None
    group = first.run.optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.95)
    torch.testing.assert_close(first.after, formula(first.before, first.grad, first.lr), rtol=1e-4, atol=1e-6)
    assert [cause.id for cause in diagnosis.causes] == [id]
    assert diagnosis.unexplained == ()
    # Nothing is left behind: counts and decays are those of three updates.
    assert {int(state["step"]) for state in first.run.optimizer.state.values()} == {3}
    assert [g["weight_decay"] for g in first.run.optimizer.param_groups] == [DECAY, 0.0]


def test_without_decay_there_is_none_to_couple(small_run: SmallRun) -> None:
    with pytest.raises((lab.BadInput, FaultFailed), match="needs a weight decay above 0"):
        small_run(faults=[{"id": "optimizer.coupled_decay"}], train={"weight_decay": 0.0})

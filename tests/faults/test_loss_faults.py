"""What each fault of the loss makes of it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from lab.context import Batch, Step
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Fault

faults = importlib.import_module("lab.faults.loss")


def changed(fault: Fault, *, index: int = 3, mode: Any = "train") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss that a fault makes, the logits [N V] and the targets [N]."""
    draw = torch.Generator().manual_seed(0)
    logits, targets = 4 * torch.randn(2, 6, 7, generator=draw), torch.randint(7, (2, 6), generator=draw)
    targets[0, :3] = -100
    step = Step(index, mode)
    step.logits, step.batch, step.parts = logits, Batch((), targets=targets), 2
    made: Any = fault
    wrapped = made.lab_loss(SimpleNamespace(step=step), step)
    next(wrapped)
    flat = logits.flatten(0, 1), targets.flatten()
    with pytest.raises(StopIteration) as end:
        wrapped.send(F.cross_entropy(*flat))
    return end.value.value, *flat


def test_the_softmax_is_taken_twice() -> None:
    loss, z, y = changed(faults.SoftmaxTwice())
    torch.testing.assert_close(loss, F.cross_entropy(z.softmax(-1), y))


def test_the_sign_is_that_of_training_only() -> None:
    loss, z, y = changed(faults.WrongSign())
    torch.testing.assert_close(loss, -F.cross_entropy(z, y))
    loss, z, y = changed(faults.WrongSign(), mode="evaluate")
    torch.testing.assert_close(loss, F.cross_entropy(z, y))


def test_probabilities_are_clamped() -> None:
    loss, z, y = changed(faults.Clamped(digits=2))
    each = F.cross_entropy(z, y, reduction="none")[y >= 0]
    assert each.max() > torch.tensor(100.0).log()
    torch.testing.assert_close(loss, each.clamp_max(torch.tensor(100.0).log().item()).mean())


def test_a_part_weighs_one_over_the_parts() -> None:
    fault = faults.MeanOfMeans()
    fault.total = torch.tensor(20)
    loss, z, y = changed(fault)
    share = 9 / 20  # what the engine multiplies by
    torch.testing.assert_close(loss * share, F.cross_entropy(z, y) / 2)


@pytest.mark.parametrize("name", ["SoftmaxTwice", "WrongSign", "Clamped"])
def test_before_its_step_a_fault_leaves_the_loss_alone(name: str) -> None:
    loss, z, y = changed(getattr(faults, name)(from_step=4))
    assert torch.equal(loss, F.cross_entropy(z, y))


def test_a_batch_in_one_part_is_refused(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match=r"loss\.mean_of_means: needs train\.accumulate"):
        small_run(faults=[{"id": "loss.mean_of_means"}])


@pytest.mark.parametrize("fault", ["softmax_twice", "wrong_sign", "clamped", "mean_of_means"])
def test_a_loop_of_one_s_own_is_refused(fault: str) -> None:
    cls = {"softmax_twice": "SoftmaxTwice", "wrong_sign": "WrongSign", "clamped": "Clamped"}.get(fault, "MeanOfMeans")
    with pytest.raises(BadInput, match=f"loss.{fault}: needs the lab's own training"):
        getattr(faults, cls)().lab_start(SimpleNamespace(config=None))

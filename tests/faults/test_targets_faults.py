"""What each fault of the targets makes of a batch."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab.context import Batch, Step
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Fault

faults = importlib.import_module("lab.faults.targets")
NAMES = {
    "shifted_twice": "ShiftedTwice",
    "not_shifted": "NotShifted",
    "permuted": "Permuted",
    "all_ignored": "AllIgnored",
}


def windows() -> torch.Tensor:  # [4 9]
    return torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))


def changed(fault: Fault, batch: Batch, *, index: int = 3, mode: Any = "train") -> Batch:
    """The batch that a fault makes of one."""
    step = Step(index, mode)
    made: Any = fault
    wrapped = made.lab_batch(SimpleNamespace(step=step), step)
    next(wrapped)
    with pytest.raises(StopIteration) as end:
        wrapped.send(batch)
    return end.value.value  # type: ignore[no-any-return]


def right(x: torch.Tensor) -> Batch:
    return Batch((x[:, :-1],), targets=x[:, 1:])


def test_targets_are_the_tokens_after_the_next() -> None:
    x = windows()
    batch = changed(faults.ShiftedTwice(), right(x))
    assert batch.targets is not None
    assert torch.equal(batch.targets[:, :-1], x[:, 2:])
    assert (batch.targets[:, -1] == -100).all()
    assert torch.equal(batch.args[0], x[:, :-1])


def test_targets_are_the_inputs_where_they_count() -> None:
    batch = right(windows())
    assert batch.targets is not None
    batch.targets[1, 2:4] = -100
    given = batch.targets.clone()
    made = changed(faults.NotShifted(), batch).targets
    assert made is not None
    counts = given >= 0
    assert torch.equal(made[counts], batch.args[0][counts])
    assert (made[~counts] == -100).all()
    assert torch.equal(batch.targets, given)  # what the source made is not written into


def test_each_row_has_the_targets_of_another() -> None:
    x = windows()
    made = changed(faults.Permuted(), right(x)).targets
    assert made is not None
    assert sorted(made.tolist()) == sorted(x[:, 1:].tolist())
    assert not (made == x[:, 1:]).all(-1).any()


@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize(("index", "mode"), [(3, "evaluate"), (2, "train")])
def test_held_out_batches_and_earlier_steps_stay(name: str, index: int, mode: str) -> None:
    batch = right(windows())
    assert changed(getattr(faults, name)(from_step=3), batch, index=index, mode=mode) is batch


def test_no_target_counts() -> None:
    made = changed(faults.AllIgnored(), right(windows())).targets
    assert made is not None
    assert (made == -100).all()


def test_padding_is_a_target() -> None:
    x = windows()[:, :-1]
    present = torch.arange(8) < torch.tensor([[3], [8], [5], [4]])
    targets = torch.where(torch.arange(8) == 1, x, -100)
    made = changed(faults.PaddingCounted(), Batch((x * present, present), targets=targets)).targets
    assert made is not None
    assert torch.equal(made[present], targets[present])
    assert (made[~present] == 0).all()


@pytest.mark.parametrize("fault", ["shifted_twice", "not_shifted", "permuted"])
def test_what_learns_no_next_token_is_refused(fault: str, small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match=rf"targets\.{fault}: needs"):
        getattr(faults, NAMES[fault])().lab_start(SimpleNamespace(config=None))
    with pytest.raises(BadInput, match=rf"targets\.{fault}: needs"):
        small_run(faults=[{"id": f"targets.{fault}"}], train={"objective": "seq2seq"})


def test_a_batch_without_padding_or_with_one_row_is_refused(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match=r"targets\.padding_counted: needs"):
        small_run(faults=[{"id": "targets.padding_counted"}])
    with pytest.raises(BadInput, match=r"targets\.permuted: needs two rows"):
        small_run(faults=[{"id": "targets.permuted"}], data={"source": "markov", "batch": 1})

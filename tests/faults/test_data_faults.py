"""What each fault of the data makes of batches."""

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

faults = importlib.import_module("lab.faults.data")


def batch_of(index: int, split: str = "train") -> Batch:
    draw = torch.Generator().manual_seed(2 * index + (split == "train"))
    x = torch.randint(50, (5, 9), generator=draw)
    return Batch((x[:, :-1], x[:, :-1] > 3), targets=x[:, 1:])


RUN = SimpleNamespace(
    data=SimpleNamespace(batch=batch_of, vocabulary=50),
    device=torch.device("cpu"),
    config=SimpleNamespace(train=SimpleNamespace(objective="masked")),
)


def changed(fault: Fault, index: int, *, mode: Any = "train", of: int | None = None) -> Batch:
    """The batch that a fault makes of that of a step; in evaluation, of batch `of`."""
    run: Any = SimpleNamespace(**vars(RUN), step=Step(index))
    step = Step(index if of is None else of, mode)
    made: Any = fault
    hook = made.lab_batch
    wrapped = hook(run) if isinstance(fault, faults.ConstantInput) else hook(run, step)
    next(wrapped)
    with pytest.raises(StopIteration) as end:
        wrapped.send(batch_of(step.index, "train" if mode == "train" else "held-out"))
    return end.value.value  # type: ignore[no-any-return]


def equal(a: Batch, b: Batch) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    return all(map(torch.equal, (*a.args, a.targets), (*b.args, b.targets)))


def started(fault: Fault) -> Fault:
    made: Any = fault
    made.lab_start(RUN)
    return fault


def test_every_step_has_the_first_batch() -> None:
    fault = started(faults.SameBatch(from_step=2))
    assert equal(changed(fault, 1), batch_of(1))
    first = changed(fault, 2)
    assert equal(first, batch_of(2))
    later = changed(fault, 3)
    assert equal(later, batch_of(2))
    assert later is not first  # whoever changes a step's batch must not change the next one's
    assert equal(changed(fault, 4, mode="evaluate"), batch_of(4, "held-out"))


def test_workers_draw_the_same_rows() -> None:
    fault = started(faults.DuplicateRows(workers=2, from_step=1))
    assert equal(changed(fault, 0), batch_of(0))
    rows = torch.tensor([0, 1, 0, 1, 0])
    made, right = changed(fault, 1), batch_of(1)
    assert made.targets is not None
    assert right.targets is not None
    for got, was in zip((*made.args, made.targets), (*right.args, right.targets), strict=True):
        assert torch.equal(got, was[rows])
    assert equal(changed(fault, 1, mode="evaluate"), batch_of(1, "held-out"))


def test_evaluation_has_batches_of_training() -> None:
    fault = started(faults.TrainInHeldOut(from_step=5))
    assert equal(changed(fault, 4, mode="evaluate", of=2), batch_of(2, "held-out"))
    assert equal(changed(fault, 5, mode="evaluate", of=2), batch_of(2, "train"))
    assert equal(changed(fault, 5), batch_of(5, "train"))


def test_every_token_is_the_same() -> None:
    fault = started(faults.ConstantInput(token=7, from_step=1))
    assert equal(changed(fault, 0), batch_of(0))
    made, right = changed(fault, 1), batch_of(1)
    assert (made.args[0] == 7).all()
    assert torch.equal(made.args[1], right.args[1])
    assert made.targets is not None
    assert right.targets is not None
    assert torch.equal(made.targets, right.targets)


@pytest.mark.parametrize("cls", ["SameBatch", "DuplicateRows", "TrainInHeldOut", "ConstantInput"])
def test_a_loop_of_one_s_own_is_refused(cls: str) -> None:
    with pytest.raises(BadInput, match="needs the lab's own training"):
        getattr(faults, cls)().lab_start(SimpleNamespace(config=None))


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        ({"id": "data.duplicate_rows", "workers": 5}, {}, "workers = 5, and 4 rows"),
        ({"id": "data.constant_input", "token": 16}, {}, "token = 16, and 16 tokens"),
        ({"id": "data.constant_input"}, {"train": {"objective": "seq2seq"}}, "needs"),
    ],
)
def test_what_means_nothing_is_refused(
    small_run: SmallRun, fault: dict[str, object], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        small_run(faults=[fault], **changes)

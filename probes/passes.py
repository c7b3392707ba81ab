"""Backward passes in vain: gradients of a part of the batch that are cleared before the update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import History, Run, Step

LOOKS = 3  # steps that have to agree
ONE = "the gradients of each step come from one backward pass"


@probe("passes", title="Does every backward pass of a step count?", cost="none; it reads what is counted anyhow")
class Passes(Probe):
    """Reads how many backward passes a step had, in a loop that the lab did not write.

    Records in the first steps and in those that are examined, where there is more than one: ``passes.count``, and
    ``passes.cleared``, after how many of them every gradient was cleared before the next, although nothing had used it.
    """

    def lab_before_update(self, step: Step) -> None:
        if step.passes > 1:
            step.record("passes.count", float(step.passes))
            step.record("passes.cleared", float(step.cleared))

    def lab_examine(self, run: Run) -> None:
        if run.config is not None:
            raise NotChecked("the lab's own training clears gradients once in a step")
        if not len(run.history.series("passes.count")):
            raise NotChecked(ONE)


@rule(
    "passes.cleared",
    title="Every backward pass of a step counts in its update",
    reads=("passes.count", "passes.cleared"),
    basis="experiment",
    phase="backward",
)
def passes_cleared(history: History) -> Iterator[Symptom]:
    """In every step, what each backward pass but the last had put into the gradients was gone when the next began.

    Exact: all of them were None or 0, the weights had not changed, no other optimiser had taken a step, the model was
    called anew and not with inputs that ask for a gradient, and the update read what the last pass left.
    """
    count, cleared = history.series("passes.count"), history.series("passes.cleared")
    if not np.all(cleared.values == count.values - 1):
        return
    if len(count) < LOOKS:
        raise NotChecked(f"{len(count)} steps of several backward passes were seen; {LOOKS} are needed")
    parts, step = int(np.median(count.values)), int(count.steps[0])
    text = f"a step has {parts} backward passes, and the gradients of all but the last are cleared before the update"
    yield Symptom(at="", since=step, seen=1.0, expected=f"{parts}", text=text)

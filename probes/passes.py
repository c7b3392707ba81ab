"""Backward passes in vain: gradients of a part of the batch that are cleared before the update."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from lab import History, Run, Step

VAIN = 10  # backward passes: a loop may warm something up
LOOKS = 3  # steps that have to agree
ONE = "the gradients of each step come from one backward pass"


@probe("passes", title="Does every backward pass of a step count?", cost="none; it reads what is counted anyhow")
class Passes(Probe):
    """Reads how many backward passes a step had, in a loop that the lab did not write.

    Records in the first steps and in those that are examined, where there is more than one: ``passes.count``, and
    ``passes.cleared``, after how many of them every gradient was cleared before the next, although nothing had used it.
    And of a run without any update, once there are ten: ``passes.vain``, how often the optimiser cleared the gradients
    of a backward pass.
    """

    def lab_start(self, run: Run) -> None:
        self._vain, self._seen = 0, 0
        self._about: object = None
        if run.config is not None:
            return
        optimizer = torch.optim.Optimizer
        plain = optimizer.zero_grad

        @functools.wraps(plain)
        def zero_grad(swept: Optimizer, *args: Any, **kwargs: Any) -> None:
            if self._vain < VAIN and swept is run.optimizer:
                run.plugins.guard(self, self._sweep)(run)
            plain(swept, *args, **kwargs)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign, assignment]
        run.cleanup.callback(setattr, optimizer, "zero_grad", plain)
        # Before, since with a closure gradients are cleared within the step. Another's updates show in the weights.
        run.cleanup.callback(run.optimizer.register_step_pre_hook(self._steps).remove)

    def _steps(self, *_: object) -> None:
        self._vain = VAIN  # an update: nothing is counted any more

    def _sweep(self, run: Run) -> None:
        """Count a backward pass whose gradients are cleared, unless weights were changed by hand."""
        step, about = run.step, (id(run.step), sum(p._version for p in run.parameters.values()))
        if about != self._about:  # also where a scaler left an update out: that begins the step anew
            self._about, self._vain, self._seen = about, 0, 0
        self._vain += step.passes > self._seen
        self._seen = step.passes
        if self._vain == VAIN:
            step.record("passes.vain", float(VAIN))

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
    "update.calls_none",
    title="The optimiser takes a step after some backward pass",
    reads=(),
    basis="experiment",
    phase="update",
)
def update_calls_none(history: History) -> Iterator[Symptom]:
    """Ten times the optimiser cleared the gradients of a backward pass, no weight changed, and it took no step."""
    if len(history.series("passes.vain")) and not len(history.series("update.calls")):
        text = f"the optimiser cleared the gradients of {VAIN} backward passes and more, and never took a step"
        yield Symptom(at="", since=0, seen=0.0, expected="1 call a step", text=text)


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

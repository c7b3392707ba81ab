"""What share of a step is spent waiting for its batch."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lab import Batch, History, Run, Step

STEPS = 21  # in a row, of which most count: a step that the system interrupts does not


@probe(
    "loader",
    title="What share of a step is spent waiting for its batch?",
    cost="none",
    stages={"loader.share": Stage("work", "timed", about="data", says="of a step spent waiting for its batch")},
)
class Loader(Probe):
    """Takes the time of a step, and of its batch within it, by the wall clock.

    Records, in the lab's own training on the CPU, ``loader.share``: the time in which the batch was made, over that of
    the whole step, in which it also passes the model, and the weights are updated; and ``loader.middle``, its median
    over the last 21 steps. A device works on while the host waits, so there this time says nothing.
    """

    def lab_start(self, run: Run) -> None:
        self._cpu = run.device.type == "cpu"
        self._batch = 0.0
        self._shares: deque[float] = deque(maxlen=STEPS)

    def lab_step(self, step: Step) -> Generator[None, bool, bool]:
        begun, self._batch = time.perf_counter(), 0.0
        done = yield
        if self._cpu and self._batch > 0:
            self._shares.append(self._batch / max(1e-9, time.perf_counter() - begun))
            step.record("loader.share", self._shares[-1])
            step.record("loader.middle", statistics.median(self._shares))
        return done

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        begun = time.perf_counter()
        batch = yield
        if step.mode == "train":
            self._batch += time.perf_counter() - begun
        return batch

    def lab_examine(self, run: Run) -> None:
        if run.config is None or not self._cpu:
            raise NotChecked("when a batch is asked for, and how long the host waits for it, is not known here")


@rule(
    "loader.waiting",
    title="A batch is made faster than it is trained on",
    reads=("loader.share",),
    basis="theory",
)
def loader_waiting(history: History) -> Iterator[Symptom]:
    """In most of the last 21 steps, making the batch took longer than all the rest of the step.

    What takes less can be hidden: made by another process, it is there when it is asked for, and a step takes as long
    as training on it. Both are measured in the same steps, so whatever else the machine does slows both.
    """
    series = history.series("loader.share")
    if len(series) < STEPS:
        raise NotChecked(f"{len(series)} steps were timed; {STEPS} are needed")
    middle = [float(np.median(series.values[i : i + STEPS])) for i in range(len(series) - STEPS + 1)]
    if middle[-1] > 0.5:
        begin = next(i for i in range(len(middle)) if min(middle[i:]) > 0.5)
        first = begin + int(np.argmax(series.values[begin:] > 0.5))
        step, share = int(series.steps[first]), middle[-1]
        text = f"from step {step} on, {share:.0%} of a step is spent waiting for its batch"
        yield Symptom(at="", since=step, seen=share, expected="below 0.5", text=text)

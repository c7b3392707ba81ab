"""How many threads an operator is computed by, and how many cores there are for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import History, Run, Step

LOOKS = 3


@probe(
    "threads",
    title="Are there more threads than cores?",
    every=10,
    cost="none",
    stages={"threads.intra_op": Stage("work", "exact", says="threads for an operator")},
)
class Threads(Probe):
    """Asks PyTorch for its threads, and the system for the cores that this process may run on.

    Records, where the model lives on the CPU, ``threads.intra_op`` and ``threads.cores``.
    """

    def lab_step_end(self, run: Run, step: Step) -> None:
        if self.due(step) and not _why_not(run):
            step.record("threads.intra_op", float(torch.get_num_threads()))
            step.record("threads.cores", float(len(os.sched_getaffinity(0))))

    def lab_examine(self, run: Run) -> None:
        if reason := _why_not(run):
            raise NotChecked(reason)


def _why_not(run: Run) -> str:
    if run.device.type != "cpu":
        return "the model does not live on the CPU"
    return "" if hasattr(os, "sched_getaffinity") else "this system does not say which cores a process may run on"


@rule(
    "threads.too_many",
    title="An operator has no more threads than there are cores",
    reads=("threads.intra_op", "threads.cores"),
    basis="experiment",
)
def threads_too_many(history: History) -> Iterator[Symptom]:
    """More threads than cores that this process may run on, in three looks in a row and until now.

    Threads of one operator wait for each other at its end, so one that is not running keeps all of them. PyTorch and
    OpenMP take the cores of a process for their default: more are asked for by somebody. Fewer may be meant.
    """
    series, cores = history.series("threads.intra_op"), history.series("threads.cores").values
    begin = series.until_now(series.values > cores, LOOKS)
    if begin is not None:
        step, seen = int(series.steps[begin]), float(series.values[-1])
        text = f"from step {step} on operators are computed by {seen:.0f} threads, on {cores[-1]:.0f} cores"
        yield Symptom(at="", since=step, seen=seen, expected=f"at most {cores[-1]:.0f}", text=text)

"""Losses of distances: is each prediction compared with its own target?"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Size

    from lab import History, Run, Step

NONE = "no mean of distances (such as mse_loss) was seen in steps that are examined"
OWN = "the lab's own training computes no mean of distances"


@probe(
    "comparison",
    title="Does a loss of distances compare each prediction with its own target?",
    cost="none; it reads the shapes that were seen anyhow",
)
class Comparison(Probe):
    """Reads the shapes that ``mse_loss``, ``l1_loss``, ``smooth_l1_loss`` and ``huber_loss`` were given.

    Where a mean or a sum is taken, of something that depends on what is trained. Records ``comparison.pairs``: with how
    many entries of the other each one is compared, the most of any such loss; above 1 where both are of the same shape
    but for axes of length 1, and are broadcast to more.
    """

    def lab_before_update(self, step: Step) -> None:
        if step.compared:
            step.record("comparison.pairs", max(_pairs(*shapes) for shapes in step.compared))

    def lab_examine(self, run: Run) -> None:
        if not len(run.history.series("comparison.pairs")) and not run.step.compared:
            raise NotChecked(NONE if run.config is None else OWN)


def _pairs(given: Size, wanted: Size) -> float:
    """With how many entries of the other each is compared: 1, but where an axis of length 1 was lost on one side.

    Who compares all with all on purpose gives both an axis of their own, [N 1 D] and [1 N D].
    """
    same = [n for n in given if n != 1] == [n for n in wanted if n != 1]
    if not same or len(given) == len(wanted):
        return 1.0
    together = math.prod(max(n) for n in itertools.zip_longest(given[::-1], wanted[::-1], fillvalue=1))
    return together / max(1, given.numel())


@rule(
    "comparison.broadcast",
    title="A loss of distances compares each prediction with its own target alone",
    reads=("comparison.pairs",),
    basis="experiment",
    phase="loss",
)
def comparison_broadcast(history: History) -> Iterator[Symptom]:
    """Predictions and targets are as many, one of them lacks an axis of length 1, and the loss is that of all pairs."""
    series = history.series("comparison.pairs")
    if found := series.first(series.values > 1):
        step, pairs = found
        text = f"the loss compares each prediction with {pairs:.0f} targets: one of both lacks an axis of length 1"
        yield Symptom(at="", since=step, seen=pairs, expected="1", text=text)

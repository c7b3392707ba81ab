"""Losses of PyTorch: are they given what they take, and is each prediction compared with its own target?"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Size

    from lab import History, Run, Step

NONE = "no such loss was seen in steps that are examined"
OWN = "the lab's own training computes no such loss"
PROBABILITIES = ("Sigmoid", "Softmax")  # operators, by their derivative


@probe(
    "comparison",
    title="Do losses compare each prediction with its own target, and are they given what they take?",
    cost="none; it reads what was seen of them anyhow",
)
class Comparison(Probe):
    """Reads the shapes that ``mse_loss``, ``l1_loss``, ``smooth_l1_loss`` and ``huber_loss`` were given.

    Where a mean or a sum is taken, of something that depends on what is trained. Records ``comparison.pairs``: with how
    many entries of the other each one is compared, the most of any such loss; above 1 where both are of the same shape
    but for axes of length 1, and are broadcast to more. And of losses that take logits, or logarithms of probabilities:
    ``comparison.sigmoid``, 1 where ``binary_cross_entropy_with_logits`` is given what a sigmoid or softmax has made,
    and ``comparison.kl``, 1 where ``kl_div`` is.
    """

    def lab_before_update(self, step: Step) -> None:
        if step.compared:
            step.record("comparison.pairs", max(_pairs(*shapes) for shapes in step.compared))
        for metric, name in (("sigmoid", "binary_cross_entropy_with_logits"), ("kl", "kl_div")):
            made = [maker in PROBABILITIES for loss, maker in step.scored if loss == name]
            if made:
                step.record(f"comparison.{metric}", float(any(made)))

    def lab_examine(self, run: Run) -> None:
        known = any(len(run.history.series(f"comparison.{metric}")) for metric in ("pairs", "sigmoid", "kl"))
        if not known and not run.step.compared and not run.step.scored:
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


def _given_probabilities(history: History, metric: str, text: str) -> Iterator[Symptom]:
    series = history.series(metric)
    if not len(series):
        raise NotChecked(history.reasons.get("comparison", NONE))
    if found := series.first(series.values > 0):
        yield Symptom(at="", since=found[0], seen=1.0, expected="0", text=text)


@rule(
    "comparison.sigmoid",
    title="A loss that takes the sigmoid itself is not given one",
    reads=(),
    basis="experiment",
    phase="loss",
)
def comparison_sigmoid(history: History) -> Iterator[Symptom]:
    """``binary_cross_entropy_with_logits`` of ``sigmoid(x)``: probabilities lie between 0.5 and 0.73 then.

    Read off the graph: the input was made by a sigmoid or a softmax, and handed on as it was.
    """
    text = "binary_cross_entropy_with_logits is given what a sigmoid or a softmax made: it takes a sigmoid once more"
    yield from _given_probabilities(history, "comparison.sigmoid", text)


@rule(
    "comparison.kl",
    title="A divergence is given logarithms of probabilities",
    reads=(),
    basis="experiment",
    phase="loss",
)
def comparison_kl(history: History) -> Iterator[Symptom]:
    """``kl_div(input, target)`` is ``sum target (log target - input)``: its input is a logarithm, and no probability.

    Read off the graph: the input was made by a sigmoid or a softmax, and handed on as it was.
    """
    text = "kl_div is given probabilities, as a softmax makes them, where it takes their logarithms"
    yield from _given_probabilities(history, "comparison.kl", text)

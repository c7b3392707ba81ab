"""Trainings side by side: the time of a step, memory and loss of each, as what it changes against the first.

What is compared is a round: one training of each, taken together. Of a step's time the change in a round is the median
over its steps, each beside the step of the same number; of anything else it is that of one number. Rounds are
independent (new processes, another seed), so it is their changes that `lab.paired` takes for pairs.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.paired import Estimate, estimate, log_ratio, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SKIPPED = 3  # steps at the beginning, in which what is needed for all others is made
LAST = 10  # steps of which the mean is the loss of a moment: one batch says little
NOTHING = "no difference to be seen"


@dataclass(frozen=True)
class Trained:
    """What one training cost, and what came of it.

    Attributes:
        steps, evaluations, generations: Seconds of each.
        losses: Of each step, in nats a token for those who predict one.
        held_out: The loss on held-out batches at the end; NaN where none was taken.
        memory: The most bytes held at a time, less what was held before anything was built; NaN where unknown.
        threads: With which PyTorch computed; 0 where unknown.
    """

    steps: Sequence[float]
    losses: Sequence[float]
    held_out: float = math.nan
    memory: float = math.nan
    evaluations: Sequence[float] = ()
    generations: Sequence[float] = ()
    threads: int = 0

    def loss_after(self, steps: int) -> float:
        """Return the mean loss of the newest steps when so many are done; NaN before the first."""
        return statistics.fmean(self.losses[max(0, steps - LAST) : steps]) if steps else math.nan


Round = list[Trained]


@dataclass(frozen=True)
class Measure:
    """One thing that is compared.

    Attributes:
        id, title: Its names, in JSON and on a terminal.
        unit: ``s``, ``B`` or ``nats``. Losses are compared by their difference, all else by its ratio.
        less, more: What to call a run with less of it than the first, and with more.
        values: The numbers of each training of a round, in the order in which they came.
    """

    id: str
    title: str
    unit: str
    less: str
    more: str
    values: Callable[[Round], list[Sequence[float]]] = field(repr=False)

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss."""
        return self.unit == "nats"


def _at_the_end(trained: Round) -> list[Sequence[float]]:
    """The losses of the last steps."""
    return [[each.loss_after(len(each.steps))] for each in trained]


def _at_equal_time(trained: Round) -> list[Sequence[float]]:
    """The losses when the one that is done first is done, if each step takes what is usual for its training.

    The sum of what the steps took would say how the machine was interrupted.
    """
    usual = [math.exp(log_ratio(trained[0].steps[SKIPPED:], each.steps[SKIPPED:])) for each in trained]
    if any(map(math.isnan, usual)):
        return [[math.nan] for _ in trained]
    end = min(time * len(each.steps) for time, each in zip(usual, trained, strict=True))
    done = [round(end / time) for time in usual]
    return [[each.loss_after(steps)] for each, steps in zip(trained, done, strict=True)]


MEASURES = (
    Measure("step", "time of a step", "s", "faster", "slower", lambda all_: [t.steps[SKIPPED:] for t in all_]),
    Measure("evaluation", "time of an evaluation", "s", "faster", "slower", lambda all_: [t.evaluations for t in all_]),
    Measure("generation", "time of a sample", "s", "faster", "slower", lambda all_: [t.generations for t in all_]),
    Measure("memory", "peak memory", "B", "less", "more", lambda all_: [[t.memory] for t in all_]),
    Measure("loss", "held-out loss at the end", "nats", "lower", "higher", lambda all_: [[t.held_out] for t in all_]),
    Measure("training_loss", "training loss at the end", "nats", "lower", "higher", _at_the_end),
    Measure("loss_at_equal_time", "training loss at equal time", "nats", "lower", "higher", _at_equal_time),
)


@dataclass(frozen=True)
class Line:
    """One run in one measure.

    Attributes:
        run: Its name.
        value: The median over the rounds.
        change: Against the first run: a ratio, or the difference of a loss. None for the first itself.
        said: What that tells.
    """

    run: str
    value: float
    change: Estimate | None
    said: str

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        change = None if self.change is None else self.change.to_dict()
        return {"run": self.run, "median": self.value, "change": change, "said": self.said}


def compare(
    rounds: Sequence[Round], names: Sequence[str], tasks: Sequence[object] = ()
) -> list[tuple[Measure, list[Line]]]:
    """Compare each training with the first of its round.

    Args:
        rounds: One training of each run, in each.
        names: Of the runs.
        tasks: What each learns, where that is known: losses of another task than the first's are not compared.

    Returns:
        Each measure that at least two runs have, with a line for each run.
    """
    found = []
    for measure in MEASURES:
        numbers = [measure.values(each) for each in rounds]  # [round][run][n]
        medians = [[_median(values) for values in each] for each in numbers]
        lines = []
        for i, name in enumerate(names):
            changes = [_change(measure, each[0], each[i]) for each in numbers]
            change = (estimate if measure.is_loss else ratio)(changes) if i else None
            said = _said(measure, change)
            if measure.is_loss and tasks and tasks[i] != tasks[0]:
                change, said = None, "of another task"
            lines.append(Line(name, _median([each[i] for each in medians]), change, said))
        if sum(math.isfinite(line.value) for line in lines) > 1:
            found.append((measure, lines))
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values and not any(map(math.isnan, values)) else math.nan


def _change(measure: Measure, first: Sequence[float], other: Sequence[float]) -> float:
    """Return a difference, or the logarithm of a ratio; NaN where there is none."""
    return _median(other) - _median(first) if measure.is_loss else log_ratio(first, other)


def _said(measure: Measure, change: Estimate | None) -> str:
    if change is None:
        return ""
    if math.isnan(change.middle):
        return "not known of both"
    if change.count == 1:
        return "one timing is no proof" if not measure.is_loss else "one run is no proof"
    if not change.enough:
        return "too few repeats to tell"
    side = change.side(0.0 if measure.is_loss else 1.0)
    return (NOTHING, measure.more, measure.less)[side]

"""The schedule: how often it is stepped, what it says, and which rate the optimiser goes by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

UPDATES = 10  # so many are seen before a schedule that does nothing is told from one that begins late
GAPS = 5  # between updates; where a scaler skips an update, the schedule goes on, and one gap is twice as long


@probe(
    "schedule",
    title="How often the schedule is stepped, what it says, and what the optimiser goes by",
    cost="a few numbers that are on the host",
    examines=True,
)
class Schedule(Probe):
    """Reads the scheduler and the groups before each update.

    Records ``schedule.set``, the rate of the first group, ``schedule.said``, the one that the scheduler set last for
    it, ``schedule.count``, how often it was stepped, ``schedule.by_update``, whether it is known to count updates, and
    ``schedule.processes``, how many train together.
    """

    def lab_before_update(self, run: Run, step: Step) -> None:
        if _unknown(run.scheduler):
            return
        scheduler: Any = _inner(run.scheduler)
        step.record("schedule.set", _number(run.optimizer.param_groups[0]["lr"]))
        step.record("schedule.said", _number(scheduler.get_last_lr()[0]))
        step.record("schedule.count", scheduler.last_epoch)
        step.record("schedule.by_update", float(run.scheduled == "update"))
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        step.record("schedule.processes", torch.distributed.get_world_size() if several else 1)

    def lab_examine(self, run: Run) -> None:
        why = _unknown(run.scheduler)
        if why:
            raise NotChecked(why)


def _unknown(scheduler: Any) -> str:
    """Why nothing can be said of a schedule; empty where something can."""
    scheduler = _inner(scheduler)
    if scheduler is None:
        return "no scheduler is known; lab.watch takes one"
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return "a schedule that waits for a plateau is not stepped once for each update"
    if not (isinstance(getattr(scheduler, "last_epoch", None), int) and hasattr(scheduler, "_last_lr")):
        return f"how often a {type(scheduler).__name__} was stepped is not known here"
    return ""


def _inner(scheduler: Any) -> Any:
    """Return the scheduler itself, where another object stands around it."""
    return getattr(scheduler, "scheduler", scheduler)


def _number(rate: Any) -> float | Tensor:
    return rate.detach().reshape(()) if isinstance(rate, torch.Tensor) else float(rate)


@rule(
    "schedule.never_stepped",
    title="The schedule is stepped",
    reads=("schedule.count", "schedule.set", "schedule.by_update"),
    basis="experiment",
    phase="update",
)
def schedule_never_stepped(history: History) -> Iterator[Symptom]:
    """A schedule that is to be stepped once for each update stood still in all of them, and so did the rate.

    The rate counts too, since a schedule can be stepped to a fraction of an epoch, which moves no counter.
    """
    count, rate = history.series("schedule.count"), history.series("schedule.set")
    still = np.all(count.values == count.values[0]) and np.all(rate.values == rate.values[0])
    if still and not np.all(history.series("schedule.by_update").values):
        raise NotChecked("whether the schedule counts updates or epochs is not known")
    if still and len(count) < UPDATES:
        raise NotChecked(f"fewer than {UPDATES} updates were seen")
    if still:
        text = f"in {len(count)} updates the schedule was not stepped once; the rate stays {rate.values[0]:.3g}"
        yield Symptom(at="", since=int(count.steps[0]), seen=0.0, expected="one step for each update", text=text)


@rule(
    "schedule.stepped_often",
    title="The schedule is stepped once for each update",
    reads=("schedule.count", "schedule.processes"),
    basis="experiment",
    phase="update",
)
def schedule_stepped_often(history: History) -> Iterator[Symptom]:
    """A schedule that is to be stepped once for each update was stepped twice or more between any two of them.

    A scaler that skips an update makes one gap longer, not each. Where several processes train, some loops step the
    schedule once for each process, and mean it.
    """
    count = history.series("schedule.count")
    # A schedule that starts again, as with warm restarts, counts from 0.
    gaps = np.diff(count.values)[(np.diff(count.steps) == 1) & (np.diff(count.values) >= 0)]
    often = len(gaps) > 0 and bool(np.all(gaps >= 2))
    if often and len(gaps) < GAPS:
        raise NotChecked(f"fewer than {GAPS + 1} updates were seen")
    if often and np.any(history.series("schedule.processes").values > 1):
        raise NotChecked("several processes train, and some loops step the schedule once for each")
    if often:
        usual = float(np.median(gaps))
        text = f"between two updates the schedule is stepped {usual:g} times: it is over in 1/{usual:g} of the run"
        yield Symptom(at="", since=int(count.steps[1]), seen=usual, expected="1", text=text)


@rule(
    "optimizer.rate_zero_at_first",
    title="A schedule that is stepped once an epoch does not begin with 0",
    reads=("schedule.count", "optimizer.rate", "movement.gradient"),
    basis="experiment",
    phase="update",
)
def optimizer_rate_zero_at_first(history: History) -> Iterator[Symptom]:
    """The rate of every group is 0 in the first ten updates at least, until the schedule is first stepped.

    There are gradients, which all of these updates leave unused: a warmup from 0 is meant for updates. Where the
    schedule is stepped and says 0, somebody may wait on purpose.
    """
    rate, count = history.series("optimizer.rate"), history.series("schedule.count")
    above = np.flatnonzero(rate.values != 0)
    idle = int(above[0]) if len(above) else 0
    if idle < UPDATES:
        return
    begun = rate.steps[idle]
    still = set(count.values[count.steps < begun])
    wanted = any(np.any(series.values[series.steps < begun] > 0) for _, series in history.each("movement.gradient"))
    if wanted and len(still) == 1 and still != set(count.values[count.steps == begun]):
        text = f"the rate is 0 in each of the first {idle} updates: until then the schedule is not stepped"
        yield Symptom(at="", since=int(rate.steps[0]), seen=0.0, expected="above 0", text=text)


@rule(
    "schedule.not_applied",
    title="The optimiser goes by the rate that the schedule says",
    reads=("schedule.said", "schedule.set"),
    basis="experiment",
    phase="update",
)
def schedule_not_applied(history: History) -> Iterator[Symptom]:
    """The schedule says one rate after another, and the optimiser's stays what it is, to the last bit.

    That the two differ is not enough: schedules can be chained, and then the last of them has the last word. But
    then the rate moves.
    """
    said, rate = history.series("schedule.said"), history.series("schedule.set")
    constant = bool(np.all(rate.values == rate.values[0]))
    if constant and len(set(said.values)) >= 3:
        if len(rate) < UPDATES:
            raise NotChecked(f"fewer than {UPDATES} updates were seen")
        low, high = float(np.min(said.values)), float(np.max(said.values))
        text = (
            f"the schedule says rates from {low:.3g} to {high:.3g}, and the optimiser's is {rate.values[0]:.3g} "
            f"in all of {len(rate)} updates"
        )
        step = int(said.steps[np.flatnonzero(said.values != rate.values)[0]])
        yield Symptom(at="", since=step, seen=float(rate.values[0]), expected="what the schedule says", text=text)

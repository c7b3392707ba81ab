"""Do several processes that begin with the same weights keep the same weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step


@probe("ranks", title="Do the processes hold the same weights?", every=10, cost="one sum a weight and a small message")
class Ranks(Probe):
    """Compares a sum of each weight and of its gradient between the processes, before an update.

    Records ``ranks.alike``, the share of weights that all processes began with alike, ``ranks.drifted``, how many of
    these are not alike any more, and ``ranks.gradients``, how many of them have gradients that are not. Where weights
    are cut, the share is below 1, and nothing is judged: a bias of 0
    begins alike whether it is cut or not. And ``ranks.apart``, how many weights differ from the beginning on, and have
    gradients that do not.
    """

    def lab_start(self) -> None:
        self._began: Tensor | None = None

    def lab_before_update(self, run: Run, step: Step) -> None:
        if why_not(run) or not self.due(step):
            return
        # A sum in one order: of the same bits it is the same.
        held = list(run.parameters.values())
        nothing = held[0].new_zeros((), dtype=torch.float64)
        sums = torch.stack(
            [
                torch.stack([p.detach().double().sum() for p in held]),
                torch.stack([nothing if p.grad is None else p.grad.double().sum() for p in held]),
            ]
        ).nan_to_num()  # [2 n]
        each = [torch.empty_like(sums) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(each, sums)
        alike, same = (torch.stack(each) == sums).all(dim=0)  # [n] each
        if self._began is None:
            self._began = alike
        step.record("ranks.alike", self._began.double().mean())
        step.record("ranks.drifted", (self._began & ~alike).sum())
        step.record("ranks.gradients", (self._began & ~same).sum())
        step.record("ranks.apart", (~self._began & ~alike & same & (sums[1] != 0)).sum())

    def lab_examine(self, run: Run) -> None:
        if reason := why_not(run):
            raise NotChecked(reason)


def why_not(run: Run) -> str:
    """Say why processes cannot be compared; empty where they can."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return "there is one process"
    if torch.distributed.get_world_size() == 1:
        return "there is one process"
    # A message that some processes do not take part in is waited for without end.
    return "" if run.config is not None else "whether every process is watched is not known"


def _apart(history: History, metric: str) -> tuple[int, float] | None:
    """Return the look from which some weights differ in every one, and how many did.

    Raises:
        NotChecked: There are too few looks, or the processes do not hold the same model.
    """
    series = history.series(metric)
    if not history.last("ranks.alike") == 1:
        raise NotChecked("weights are cut between the processes, or did not begin alike")
    if len(series) < 2:
        raise NotChecked("one look at the processes tells of no drift")
    found = series.first(series.values > 0)
    return found if found and all(series.values[series.steps >= found[0]] > 0) else None


@rule(
    "ranks.drift",
    title="All processes keep the same weights",
    reads=("ranks.drifted",),
    basis="experiment",
    phase="update",
)
def ranks_drift(history: History) -> Iterator[Symptom]:
    """What was alike, and is given the same updates, stays alike to the last bit; if not, it drifts."""
    if found := _apart(history, "ranks.drifted"):
        step, count = found
        text = f"{count:.0f} weights that all processes began with alike differ at step {step}"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)


@rule(
    "ranks.gradients",
    title="All processes update by the same gradients",
    reads=("ranks.gradients",),
    basis="experiment",
    phase="backward",
)
def ranks_gradients(history: History) -> Iterator[Symptom]:
    """Averages over all processes are the same in each of them, to the last bit."""
    if found := _apart(history, "ranks.gradients"):
        step, count = found
        text = f"just before the update of step {step} the processes hold other gradients of {count:.0f} weights"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)


@rule(
    "ranks.apart",
    title="Gradients are averaged of one model",
    reads=("ranks.apart",),
    basis="experiment",
    phase="forward",
)
def ranks_apart(history: History) -> Iterator[Symptom]:
    """Weights differ between the processes from the first look on, and their gradients are the same, and not 0.

    Who averages gradients means to train one model. Where weights are cut, or each process has experts of its own,
    their gradients differ as they do.
    """
    series = history.series("ranks.apart")
    found = series.first(series.values > 0)
    if found and all(series.values[series.steps >= found[0]] > 0):
        if len(series) < 2:
            raise NotChecked("one look at the processes tells of no difference that stays")
        step, count = found
        text = f"{count:.0f} weights differ between the processes at step {step}, and are given the same gradients"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)

"""Do several processes that begin with the same weights keep the same weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

NONE = "there is one process, or the others left nothing that could be compared"


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
        if run.config is not None and (reason := why_not(run)):
            raise NotChecked(reason)  # in a loop of others it shows when all have ended


def why_not(run: Run) -> str:
    """Say why processes cannot be compared; empty where they can."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return "there is one process"
    if torch.distributed.get_world_size() == 1:
        return "there is one process"
    # A message that some processes do not take part in is waited for without end.
    return "" if run.config is not None else "in a loop of others nothing is sent while it trains"


class Looks:
    """What the processes were seen to have in common, look by look.

    Of the lab's own training it was recorded as the probe `Ranks` says. In a loop of others, the fingerprints that each
    process recorded are compared: of equal bits they are equal, and two that differ differ in them as well.

    Attributes:
        steps: Of the looks, [n] as all that follows.
        alike: The share of weights that all began with alike.
        drifted: How many of these are not alike any more.
        gradients: How many of them have gradients that are not.
        apart: How many weights differ from the beginning on and have gradients that do not, and are not 0.
        batches: 1 where all were called with the same batch; NaN where that is not known.

    Raises:
        NotChecked: There is nothing to compare.
    """

    def __init__(self, history: History) -> None:
        if history.others:
            self._compare([history, *history.others.values()])
            return
        names = ("alike", "drifted", "gradients", "apart")
        self.alike, self.drifted, self.gradients, self.apart = (history.series(f"ranks.{n}").values for n in names)
        self.steps = history.series("ranks.alike").steps
        self.batches = np.full(len(self.steps), np.nan)
        if not len(self.steps):
            raise NotChecked(history.reasons.get("ranks", NONE))

    def _compare(self, each: list[History]) -> None:
        steps = sorted(set.intersection(*map(_steps, each)))
        kinds = ("weight", "gradient", "batch")
        weights, gradients, batches = ([_prints(one, kind, steps) for one in each] for kind in kinds)
        names = _names(weights)
        if not steps or not names:
            raise NotChecked(NONE)
        alike, same = (
            np.stack([_equal(prints, name, len(steps)) for name in names]) for prints in (weights, gradients)
        )
        moving = np.stack([(gradients[0].get(name, np.zeros((1, len(steps)))) != 0).any(0) for name in names])
        began = alike[:, :1]  # of [weights looks]
        self.steps = np.array(steps)
        self.alike = np.broadcast_to(began, alike.shape).mean(0)
        self.drifted = (began & ~alike).sum(0)
        self.gradients = (began & ~same).sum(0)
        self.apart = (~began & ~alike & same & moving).sum(0)
        called = [_equal(batches, name, len(steps)) for name in _names(batches)]
        self.batches = np.stack(called).all(0).astype(float) if called else np.full(len(steps), np.nan)

    def lasting(self, counts: np.ndarray) -> tuple[int, float] | None:
        """The look from which a count is above 0 in every one, and what it was.

        Raises:
            NotChecked: It is so in the only look that there is.
        """
        where = np.flatnonzero(counts > 0)
        if not len(where) or not (counts[where[0] :] > 0).all():
            return None
        if len(counts) < 2:
            raise NotChecked("one look at the processes tells of no difference that stays")
        return int(self.steps[where[0]]), float(counts[where[0]])

    def need_one_model(self) -> None:
        """Require that all processes began with the same weights.

        Raises:
            NotChecked: They did not.
        """
        if self.alike[-1] != 1:
            raise NotChecked("weights are cut between the processes, or did not begin alike")
        if len(self.steps) < 2:
            raise NotChecked("one look at the processes tells of no drift")


def _steps(history: History) -> set[int]:
    """The steps at which weights were read."""
    sites = history.sites("fingerprint.weight")[:1]
    return {int(step) for site in sites for step in history.series("fingerprint.weight", site).steps}


def _names(each: list[dict[str, np.ndarray]]) -> list[str]:
    return list(dict.fromkeys(name for one in each for name in one))


def _prints(history: History, kind: str, steps: list[int]) -> dict[str, np.ndarray]:
    """The fingerprints of each tensor of a kind, [numbers looks], of those that were taken at each of the steps."""
    found: dict[str, list[np.ndarray]] = {}
    for metric in (f"fingerprint.{kind}", f"fingerprint.{kind}_signed"):
        for site, series in history.each(metric):
            values = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))  # the last of a step counts
            if all(step in values for step in steps):
                found.setdefault(site, []).append(np.array([values[step] for step in steps]))
    return {site: np.stack(numbers) for site, numbers in found.items()}


def _equal(each: list[dict[str, np.ndarray]], name: str, looks: int) -> np.ndarray:  # -> [looks]
    """At which looks all processes have the same; what only some of them have is not the same."""
    first = each[0].get(name)
    if first is None or any(name not in one or one[name].shape != first.shape for one in each):
        return np.full(looks, all(name not in one for one in each))
    alike = [((one[name] == first) | (np.isnan(one[name]) & np.isnan(first))).all(0) for one in each]
    return np.asarray(np.stack(alike).all(0))


@rule(
    "ranks.drift",
    title="All processes keep the same weights",
    reads=(),
    basis="experiment",
    phase="update",
)
def ranks_drift(history: History) -> Iterator[Symptom]:
    """What was alike, and is given the same updates, stays alike to the last bit; if not, it drifts."""
    looks = Looks(history)
    looks.need_one_model()
    if found := looks.lasting(looks.drifted):
        step, count = found
        text = f"{count:.0f} weights that all processes began with alike differ at step {step}"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)


@rule(
    "ranks.gradients",
    title="All processes update by the same gradients",
    reads=(),
    basis="experiment",
    phase="backward",
)
def ranks_gradients(history: History) -> Iterator[Symptom]:
    """Averages over all processes are the same in each of them, to the last bit."""
    looks = Looks(history)
    looks.need_one_model()
    if found := looks.lasting(looks.gradients):
        step, count = found
        text = f"just before the update of step {step} the processes hold other gradients of {count:.0f} weights"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)


@rule(
    "ranks.apart",
    title="Gradients are averaged of one model",
    reads=(),
    basis="experiment",
    phase="forward",
)
def ranks_apart(history: History) -> Iterator[Symptom]:
    """Weights differ between the processes from the first look on, and their gradients are the same, and not 0.

    Who averages gradients means to train one model. Where weights are cut, or each process has experts of its own,
    their gradients differ as they do.
    """
    looks = Looks(history)
    if found := looks.lasting(looks.apart):
        step, count = found
        text = f"{count:.0f} weights differ between the processes at step {step}, and are given the same gradients"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)


@rule(
    "shards.same_batch",
    title="Each process trains on rows of its own",
    reads=(),
    basis="experiment",
)
def shards_same_batch(history: History) -> Iterator[Symptom]:
    """Processes that hold the same weights, and are given the same rows in every look, compute one thing twice.

    The rows have to be others from look to look: who trains on one batch on purpose has only that.
    """
    looks = Looks(history)
    looks.need_one_model()
    if not history.others:
        raise NotChecked("the lab's own training compares its rows one by one")
    if np.isnan(looks.batches).any():
        raise NotChecked("the batches are not known")
    seen = [history.series("fingerprint.batch", site).values for site in history.sites("fingerprint.batch")]
    if all((values == values[:1]).all() for values in seen):
        raise NotChecked("every batch is the same")
    if looks.batches.all():
        count = len(history.others) + 1
        text = f"all {count} processes were called with the same batch in each of {len(looks.steps)} looks"
        yield Symptom(at="", since=int(looks.steps[0]), seen=count, expected="1", text=text)

"""Does evaluation give the same answer twice?"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .dispatch import listening

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Series, Step

ROUNDING = 1e-4
ROWS, POSITIONS = 2, 128  # so many positions are enough
DROPOUT = {"bernoulli", "native_dropout", "_fused_dropout"}
NORMAL = {"normal", "normal_functional", "randn", "randn_like"}


@probe(
    "determinism",
    title="Does evaluation give the same answer twice?",
    cost="two forward passes on two rows, or on one that is long",
    examines=True,
    seldom=True,
)
class Determinism(Probe):
    """Calls the model twice in evaluation mode on the same rows, with random numbers running on between the calls.

    Records ``determinism.difference``: the largest difference of the outputs relative to their largest value. When that
    is not 0, the next experiment looks at each site: ``determinism.site_difference``, and ``determinism.dropped``: 1 if
    wherever the two values differ one of them is 0, else 0. In the first experiment and in that one it also looks at
    what is drawn: ``determinism.sampled`` is 1 where that is normal numbers and nothing else, else 0, and
    ``determinism.dropout`` where it is dropout and nothing else.
    """

    def lab_start(self) -> None:
        self._looks = 0

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        # The last ones: others are given the first. A state that is kept from one call to the next, and was left by a
        # call with the same rows, would be what these calls leave: they would agree.
        rows = step.batch.rows(ROWS, last=True, enough=POSITIONS)
        run.model.eval()
        suspect = run.history.last("determinism.difference") > ROUNDING
        made, drawn = [], set[str]()
        self._looks += 1
        traced = suspect or self._looks == 1

        def note(func: Any, *_: object) -> None:
            if torch.Tag.nondeterministic_seeded in func.tags:
                drawn.add(func.overloadpacket.__name__.rstrip("_"))

        with torch.no_grad(), listening(note) if traced else contextlib.nullcontext():
            for _ in range(2):
                with run.sites.capture("**" if suspect else "") as values:
                    made.append((run.call(rows), values))
        (first, was), (second, now) = made
        step.record("determinism.difference", _difference(first, second))
        if traced:
            step.record("determinism.sampled", float(bool(drawn) and drawn <= NORMAL))
            step.record("determinism.dropout", float(bool(drawn) and drawn <= DROPOUT))
        names = [name for name in was if name in now and _compare(was[name], now[name])]
        if names:
            pairs = [(was[name], now[name]) for name in names]
            step.record_all("determinism.site_difference", names, torch.stack([_difference(*pair) for pair in pairs]))
            step.record_all("determinism.dropped", names, torch.stack([_dropped(*pair) for pair in pairs]))


def _compare(was: Tensor, now: Tensor) -> bool:
    return was.is_floating_point() and was.shape == now.shape and was.numel() > 0


def _difference(was: Tensor, now: Tensor) -> Tensor:
    return (was.float() - now.float()).abs().amax() / was.float().abs().amax().clamp_min(1e-30)


def _dropped(was: Tensor, now: Tensor) -> Tensor:
    return ((was == now) | (was == 0) | (now == 0)).all().float()


def _differences(history: History) -> Series:
    """Return how far two evaluations were apart, where that says something.

    Raises:
        NotChecked: It does not.
    """
    series = history.series("determinism.difference").finite
    if not len(series):
        raise NotChecked("the outputs were not finite when it was tried")
    if history.last("determinism.sampled") == 1 and np.any(series.values > ROUNDING):
        raise NotChecked("normal numbers are drawn when the model is evaluated, as one with a random code does")
    return series


@rule(
    "evaluation.random",
    title="Evaluation gives the same answer twice",
    reads=("determinism.difference",),
    basis="experiment",
    phase="forward",
)
def evaluation_random(history: History) -> Iterator[Symptom]:
    """In evaluation mode nothing is drawn: two calls agree but for the order in which a device adds.

    A model that draws normal numbers, and nothing else, may be meant to: a variational autoencoder samples its code.
    """
    series = _differences(history)
    if found := series.first(series.values > ROUNDING):
        step, difference = found
        text = f"two evaluations of the same batch differ by {difference:.2g} of the largest output, at step {step}"
        yield Symptom(at="", since=step, seen=difference, expected="0", text=text)


def _first_random(history: History) -> tuple[str, int, float] | None:
    """Return the first site of the forward pass at which two evaluations differ, since when, and by how much."""
    _differences(history)
    random = [
        (history.order.get(site, len(history.order)), site, *found)
        for site, series in history.each("determinism.site_difference")
        if (found := series.first(series.values > ROUNDING))
    ]
    return min(random)[1:] if random else None


@rule(
    "evaluation.random_site",
    title="No site of the model differs between two evaluations",
    reads=("determinism.difference",),
    basis="experiment",
    phase="forward",
)
def evaluation_random_site(history: History) -> Iterator[Symptom]:
    """Where evaluation as a whole is random: all before the first site that differs is the same in both calls."""
    if found := _first_random(history):
        site, step, seen = found
        text = f"{site} is the first to differ between two evaluations, by {seen:.2g} of its largest value"
        yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@rule(
    "evaluation.dropped",
    title="Nothing is dropped out when the model is evaluated",
    reads=("determinism.difference",),
    basis="experiment",
    phase="forward",
)
def evaluation_dropped(history: History) -> Iterator[Symptom]:
    """Two values of the first site that differs are equal wherever neither is 0: so dropout leaves a tensor.

    Or what is dropped out lies inside: then the operators that draw are those of dropout, and no others.
    """
    if found := _first_random(history):
        site, step, _ = found
        dropped = history.series("determinism.dropped", site)
        if (dropped.values[dropped.steps >= step] == 1).all():
            text = f"at {site} two evaluations differ only where one of them is 0, as dropout leaves it"
            yield Symptom(at=site, since=step, seen=1.0, expected="0", text=text)
        elif history.last("determinism.dropout") == 1:
            text = f"{site} is the first to differ between two evaluations, and all that is drawn in them is dropout"
            yield Symptom(at=site, since=step, seen=1.0, expected="0", text=text)

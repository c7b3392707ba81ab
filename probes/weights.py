"""Weights: their size, how far each step moves them, and whether each that should move does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step


ROUNDING = 1e-6  # of the largest gradient: what sums of float32 leave of one that is 0
HALF_A_BIT = 2.0**-25  # of a weight in float32


class _Moves(Probe):
    """Copies the weights just before an update, when the activations are freed, and compares just after."""

    def lab_start(self, run: Run) -> None:
        self._before: dict[str, Tensor] = {}
        self._names = tuple(run.parameters)

    def wants(self, step: Step) -> bool:
        return self.due(step)

    def lab_before_update(self, run: Run, step: Step) -> None:
        if self.wants(step):
            self._before = {name: p.detach().clone() for name, p in run.parameters.items()}

    def moved(self, run: Run) -> Tensor:
        """Return how far each parameter moved, the norm of the difference, [n]; and forget the copies."""
        now = [p.detach() for p in run.parameters.values()]
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(now, list(self._before.values()))))
        self._before = {}
        return moved


@probe(
    "weights",
    title="Norm of every weight, and of its update relative to it",
    every=0,
    cost="one copy of the weights",
    stages={"learning_rate": Stage("rate")},
)
class Weights(_Moves):
    """Records ``weight.norm``, ``update.ratio`` (norm of the update over norm of the weight), and ``learning_rate``."""

    def lab_step_end(self, run: Run, step: Step) -> None:
        if step.lr is not None:
            step.record("learning_rate", step.lr)
        if self._before:
            norms = torch.stack(torch._foreach_norm(list(self._before.values())))
            step.record_all("weight.norm", self._names, norms)
            step.record_all("update.ratio", self._names, self.moved(run) / norms.clamp_min(1e-30))
        if step.index % 50 == 0:
            for name, p in run.parameters.items():
                if p.dim() >= 2:
                    flat = p.detach().reshape(-1)
                    step.show("histogram", "weight", flat[:: max(1, len(flat) // 4096)].clone(), name)


@probe(
    "movement",
    title="Does every trainable parameter that has a gradient move?",
    cost="one copy of the weights, on examined steps",
    examines=True,
)
class Movement(_Moves):
    """Compares each parameter before and after an update.

    Records ``movement.distance`` of one update, ``movement.gradient``, the norm of its gradient,
    ``movement.held``, whether the optimiser holds it, ``movement.rate``, the learning rate of its group, and for what
    it does not hold ``movement.elsewhere``: how far that moved since it was last looked at, by whatever else trains it.
    """

    def lab_start(self, run: Run) -> None:
        super().lab_start(run)
        self._kept: dict[str, Tensor] = {}

    def wants(self, step: Step) -> bool:
        # The second step too: what moved between two looks tells who else trains a parameter.
        return step.examined or step.index == 1

    def lab_before_update(self, run: Run, step: Step) -> None:
        super().lab_before_update(run, step)
        if self._before:
            held = run.held
            others = {name: self._before[name] for name, p in run.parameters.items() if id(p) not in held}
            for name in others.keys() & self._kept.keys():
                step.record("movement.elsewhere", torch.linalg.vector_norm(others[name] - self._kept[name]), name)
            self._kept = others
            self._have = tuple(n for n, p in run.parameters.items() if p.grad is not None and not p.grad.is_sparse)
            grads = [g for n in self._have if (g := run.parameters[n].grad) is not None]
            if grads:
                step.record_all("movement.gradient", self._have, torch.stack(torch._foreach_norm(grads)))

    def lab_step_end(self, run: Run, step: Step) -> None:
        if not self._before:
            return
        step.record_all("movement.distance", self._names, self.moved(run))
        rates = {id(p): float(group["lr"]) for group in run.optimizer.param_groups for p in group["params"]}
        for name, p in run.parameters.items():
            step.record("movement.held", float(id(p) in rates), name)
            step.record("movement.rate", rates.get(id(p), 0.0), name)


@rule(
    "weight.nonfinite",
    title="Every weight is finite",
    reads=("weight.norm",),
    basis="theory",
    phase="update",
)
def weight_nonfinite(history: History) -> Iterator[Symptom]:
    """A weight that is NaN or infinite stays so."""
    for name, series in history.each("weight.norm"):
        if found := series.first(~np.isfinite(series.values)):
            step, seen = found
            text = f"the weight {name} is not finite at step {step}"
            yield Symptom(at=name, since=step, seen=seen, expected="finite", text=text)


def _unmoved(history: History, *, held: bool) -> Iterator[Symptom]:
    if not np.any(np.isfinite(_all(history, "movement.distance"))):
        raise NotChecked("no weight was finite on an examined step")
    largest: dict[int, float] = {}
    for _, series in history.each("movement.gradient"):
        for step, value in zip(series.steps, series.values, strict=True):
            largest[int(step)] = max(largest.get(int(step), 0.0), float(value))
    for name in history.sites("movement.gradient"):
        gradient = history.series("movement.gradient", name)
        distance = history.series("movement.distance", name)
        # What is 0 but for rounding, as of a bias before a norm, moves nothing.
        there = gradient.values > ROUNDING * np.array([largest.get(int(step), 0.0) for step in gradient.steps])
        is_held = history.series("movement.held", name).values > 0
        rate = history.series("movement.rate", name).values
        at = np.isin(distance.steps, gradient.steps)
        still = (distance.values[at] == 0) & (gradient.values > 0) & (is_held[at] == held)
        if held:
            still &= rate[at] > 0
        # Nor does what is lost when it is added to the weight, by rate and gradient alone.
        size = history.last("weight.norm", name)
        there &= ~(rate[at] * gradient.values < HALF_A_BIT * size) if held else True
        still, steps, norms = still[there], gradient.steps[there], gradient.values[there]
        if np.all(still) and len(still):
            step, norm = int(steps[0]), float(norms[0])
            why = "although the optimiser holds it" if held else "and the optimiser does not hold it"
            yield Symptom(
                at=name,
                since=step,
                seen=0.0,
                expected="above 0",
                text=f"{name} has a gradient (norm {norm:.3g} at step {step}) and has not moved "
                f"in any of {len(still)} examined steps, {why}",
            )


def _all(history: History, metric: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([np.empty(0), *(series.values for _, series in history.each(metric))])


@rule(
    "movement.unheld",
    title="The optimiser holds every parameter that has a gradient",
    reads=("movement.distance", "movement.gradient"),
    basis="experiment",
    phase="update",
)
def movement_unheld(history: History) -> Iterator[Symptom]:
    """A trainable parameter that has a gradient, is in no group of the optimiser, and is not moved by anything else."""
    unsure = False
    for symptom in _unmoved(history, held=False):
        elsewhere = history.series("movement.elsewhere", symptom.at).values
        unsure |= not len(elsewhere)
        if len(elsewhere) and not np.any(elsewhere != 0):
            yield symptom
    if unsure:
        raise NotChecked("one step was seen; whether another optimiser trains what this one does not shows in the next")


@rule(
    "movement.none",
    title="Every parameter that the optimiser holds and that has a gradient moves",
    reads=("movement.distance", "movement.gradient"),
    basis="experiment",
    phase="update",
)
def movement_none(history: History) -> Iterator[Symptom]:
    """A trainable parameter that has a gradient, a learning rate above 0, and does not move.

    A gradient that is rounding alone, as that of a bias before a batch norm, is none; nor has a weight to move that is
    so large that the rate times its gradient is lost when it is added.
    """
    yield from _unmoved(history, held=True)

"""Weights that are put back: are they another copy than the weights that are there?"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lab import History, Run


@probe("restoring", title="When weights are put back, were they kept?", cost="a look at a state dict that is loaded")
class Restoring(Probe):
    """Notes which state dicts are taken of the model, and looks at those that are loaded into it.

    Records for each that is loaded again ``restoring.same``: whether all its tensors are the model's own, and these
    have changed since it was taken. Loading it then changes nothing.
    """

    def lab_start(self, run: Run) -> None:
        self._taken: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._run = run
        module = torch.nn.Module
        take, load = module.state_dict, module.load_state_dict

        def state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            answer = take(model, *args, **kwargs)
            if model is run.model:
                run.plugins.guard(self, self._take)(answer)
            return answer

        def load_state_dict(model: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
            if model is run.model:
                run.plugins.guard(self, self._look)(state)
            return load(model, state, *args, **kwargs)

        module.state_dict, module.load_state_dict = state_dict, load_state_dict  # type: ignore[method-assign, assignment]
        run.cleanup.callback(setattr, module, "load_state_dict", load)
        run.cleanup.callback(setattr, module, "state_dict", take)

    def _versions(self) -> int:
        return sum(p._version for p in self._run.model.parameters())

    def _take(self, state: Any) -> None:
        key = id(state)
        self._taken[key] = (weakref.ref(state, lambda _: self._taken.pop(key, None)), self._versions())

    def _look(self, state: Any) -> None:
        taken = self._taken.get(id(state))
        if taken is None or id(taken[0]()) != id(state):
            return
        mine = dict(self._run.model.named_parameters())
        same = all(name in state and state[name].data_ptr() == p.data_ptr() for name, p in mine.items())
        self._run.step.record("restoring.same", float(same and bool(mine) and taken[1] != self._versions()))

    def lab_examine(self, run: Run) -> None:
        if not run.history.series("restoring.same"):
            raise NotChecked("no weights that were taken of the model in this run were put back")


@rule(
    "restoring.same",
    title="Weights that are put back were kept apart from the model",
    reads=("restoring.same",),
    basis="experiment",
    phase="update",
)
def restoring_same(history: History) -> Iterator[Symptom]:
    """A state dict was taken, the weights changed, and it was loaded again: its tensors are the model's own.

    ``state_dict()`` gives no copy, so that it holds the newest weights too. Exact: each parameter has the memory that
    the dict has for it.
    """
    series = history.series("restoring.same")
    if found := series.first(series.values == 1):
        step, _ = found
        text = f"the weights put back at step {step} share their memory with the model: loading them changes nothing"
        yield Symptom(at="", since=step, seen=1.0, expected="a copy", text=text)

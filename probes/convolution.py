"""Which positions does a convolution see? An experiment: its impulse response, by differentiation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .impulse import calls, shares

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lab import History, Run, Step

# As for causality.future: in exact arithmetic it is 0.
ROUNDING = 1e-6


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a weight [outputs inputs kernel] of more than one tap.

    In place of PyTorch's own, the module around it that has no other weights: what that puts before the beginning or
    cuts off at the end belongs to the convolution.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 3 and weight.shape[-1] > 1 and name:
            parent = name.rpartition(".")[0]
            around = model.get_submodule(parent)
            alone = parent and {*map(id, around.parameters())} == {*map(id, module.parameters())}
            if alone and isinstance(module, torch.nn.Conv1d) and not isinstance(around, torch.nn.ModuleList):
                found[parent] = around
            else:
                found[name] = module
    return found


@probe(
    "convolution",
    title="Which positions does each convolution see?",
    cost="forward and backward on one row",
    examines=True,
    seldom=True,
)
class Convolution(Probe):
    """Differentiates what each convolution gives out at one position by what it is given at every position.

    Records ``convolution.later``, ``convolution.own`` and ``convolution.earlier``: the shares of the gradient that lie
    on later positions, on the position itself, and on earlier ones. Another position in each look.
    """

    def lab_start(self, run: Run) -> None:
        self._modules = _convolutions(run.model)

    def lab_examine(self, run: Run, step: Step) -> None:
        if not self._modules:
            raise NotChecked("no convolution over positions in this model")
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        with torch.enable_grad():
            found = calls(run, step.batch.rows(1), self._modules)
            found = {name: call for name, call in found.items() if call.made.shape[call.axis] >= 4}
            if not found:
                raise NotChecked("no convolution over positions in this model gives out as many as it is given")
            places = {}
            for name, call in found.items():
                length = call.made.shape[call.axis]
                places[name] = (length // 2 + step.index) % (length - 2) + 1
            for name, size in shares(found, places).items():
                total, place = size.sum().clamp_min(1e-30), places[name]
                step.record("convolution.later", size[place + 1 :].sum() / total, name)
                step.record("convolution.own", size[place] / total, name)
                step.record("convolution.earlier", size[:place].sum() / total, name)


def _next_token(history: History) -> None:
    share = history.series("causality.next_token").finite.values
    if not len(share) or not np.max(share) > 0.99:
        raise NotChecked("the targets are not the next tokens, so a convolution need not be causal")


@rule(
    "convolution.later",
    title="No convolution takes from later positions",
    reads=("convolution.later", "causality.future", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def convolution_later(history: History) -> Iterator[Symptom]:
    """Asked where the model as a whole is shown later tokens: a convolution over something else may look both ways."""
    _next_token(history)
    leak = history.series("causality.future").finite
    if not (leak.values > ROUNDING).any():
        return
    for name, series in history.each("convolution.later"):
        if found := series.first(series.values > ROUNDING):
            text = f"{name} takes {found[1]:.0%} of what moves its output from later positions"
            yield Symptom(at=name, since=found[0], seen=found[1], expected="0", text=text)


@rule(
    "convolution.own",
    title="Each convolution sees the position that it stands for",
    reads=("convolution.own", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def convolution_own(history: History) -> Iterator[Symptom]:
    """Exactly 0 from the position itself, and something from earlier ones, whenever looked at: it is padded too far.

    Where a model's targets are its own inputs that is what it must do; so only next-token targets are judged.
    """
    _next_token(history)
    for name, series in history.each("convolution.own"):
        earlier = history.series("convolution.earlier", name).values
        missed = (series.values == 0) & (earlier > 0)
        if len(series.values) >= 2 and missed[-2:].all() and (found := series.first(missed)):
            text = f"{name} takes nothing from the newest position, and all from earlier ones"
            yield Symptom(at=name, since=found[0], seen=0.0, expected="above 0", text=text)

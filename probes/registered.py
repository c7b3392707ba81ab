"""Does every layer that the loss depends on belong to the model? Those in a Python list do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import Cause, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lab import History, Run, Step

LOOKS = 3

UNREGISTERED = Cause(
    id="model.unregistered",
    title="Layers in a Python list do not belong to the model: they are not trained, saved or moved",
    must=("registered.hidden",),
    repair="Keep them in nn.ModuleList or nn.ModuleDict (parameters: nn.ParameterList), and make the optimiser after "
    "that. parameters(), state_dict(), to(), train() and eval() find what is an attribute by itself, and nothing in a "
    "list, tuple or dict.",
    refute="The weights named are among model.parameters().",
    look="len(list(model.parameters())), and print(model): which layers are missing?",
    source="PyTorch documentation: ModuleList; pytorch/pytorch issue 715",
)


@probe(
    "registered",
    title="Are there layers that the loss depends on and the model does not hold?",
    cost="a look at the attributes of each module; a walk through the graph of the loss where one holds such layers",
    seldom=True,
)
class Registered(Probe):
    """Looks for several modules of one kind in a list, tuple or dict that is an attribute of a module of the model.

    Records ``registered.hidden`` by attribute: the share of their weights that the loss depends on with a gradient,
    that neither the model nor the optimiser holds, and that have not changed since the first look. It is 0 under no
    name where there is no such attribute. A single module in a list is left out: so a teacher is hidden on purpose.
    """

    def lab_start(self) -> None:
        self._versions: dict[int, int] = {}

    def lab_before_update(self, run: Run, step: Step) -> None:
        if not step.thorough:
            return
        found = dict(_containers(run.model))
        step.record("registered.hidden", 0.0)
        if not found or step.loss is None:
            return
        known = {id(p) for p in run.model.parameters()} | run.held
        leaves = _leaves(step.loss)
        for name, modules in found.items():
            weights = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
            hidden = [
                key
                for key, p in weights.items()
                if key not in known and key in leaves and self._versions.setdefault(key, p._version) == p._version
            ]
            if weights:
                step.record("registered.hidden", len(hidden) / len(weights), name)


def _containers(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the name of each attribute that is a plain container of several modules of one kind, and these."""
    own = vars(torch.nn.Module()).keys()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in own:
                continue
            parts = list(value.values()) if type(value) is dict else value
            if type(parts) not in (list, tuple) or len({id(part) for part in parts}) < 2:
                continue
            kinds = {type(part) for part in parts}
            if len(kinds) == 1 and isinstance(parts[0], torch.nn.Module):
                yield f"{path}.{name}".removeprefix("."), list(parts)


def _leaves(loss: torch.Tensor) -> set[int]:
    """The ids of all tensors to which a backward pass from here brings a gradient."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(after for after, _ in node.next_functions)
    return found


@rule(
    "registered.hidden",
    title="Every layer that the loss depends on belongs to the model",
    reads=("registered.hidden",),
    basis="experiment",
    phase="update",
)
def registered_hidden(history: History) -> Iterator[Symptom]:
    """Several layers in a Python list, whose weights have gradients, and which nobody updates in three looks."""
    for name in history.sites("registered.hidden"):
        series = history.series("registered.hidden", name)
        begin = series.until_now(series.values > 0, LOOKS)
        if name and begin is not None:
            step, share = int(series.steps[begin]), float(np.min(series.values[begin:]))
            text = f"{name} is a Python list or dict of layers: {share:.0%} of their weights have a gradient, belong "
            text += "neither to the model nor to the optimiser, and do not change"
            yield Symptom(at=name, since=step, seen=share, expected="0", text=text)

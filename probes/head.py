"""The output head: are the logits what its own weights make of its input?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch

from .loss import LARGEST_EXCESS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

ROUNDING = 0.02  # bfloat16 keeps 8 bits of a logit, and what it is a sum of rounds too


@probe("head", title="Are the first logits the head's weights times its input?", cost="one product, at step 0 only")
class Head(Probe):
    """At step 0 computes the logits again from the input of the layer that makes them.

    Records, by the name of that layer, ``head.factor``: the number by which the logits are the product (least
    squares), and ``head.rest``: what is left of them beside it, as a share.
    """

    def lab_start(self, run: Run) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for name, module in run.model.named_modules():
            linear = isinstance(module, torch.nn.Linear) or f"{name}.out" == run.sites.output
            weight = dict(module.named_parameters(recurse=False)).get("weight")  # of its own: not an adapter's
            if linear and module not in run.compiled and torch.is_tensor(weight) and weight.dim() == 2:
                self._handles.append(module.register_forward_pre_hook(self._note(name)))
                run.cleanup.callback(self._handles[-1].remove)

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training and args and torch.is_tensor(args[0]):
                self._inputs[name] = args[0].detach()

        return hook

    def lab_before_update(self, run: Run, step: Step) -> None:
        for handle in self._handles:
            handle.remove()
        inputs, self._inputs, self._handles = self._inputs, {}, []
        if step.index or step.logits is None:
            return
        logits = step.logits.detach()
        for name, x in reversed(inputs.items()):
            layer = run.model.get_submodule(name)
            weight = layer.get_parameter("weight").detach()
            if weight.shape[0] != logits.shape[-1] or x.numel() // x.shape[-1] != logits[..., 0].numel():
                continue
            with torch.no_grad():
                made = x.reshape(-1, x.shape[-1]).double() @ weight.double().t()
                bias = getattr(layer, "bias", None)
                made = made if bias is None else made + bias.detach().double()
                seen = logits.reshape(made.shape).double()
                factor = (made * seen).sum() / made.square().sum()
                rest = torch.linalg.vector_norm(seen - factor * made) / torch.linalg.vector_norm(seen)
            step.record("head.factor", factor, name)
            step.record("head.rest", rest, name)
            return


@rule(
    "head.multiplied",
    title="Logits are not multiplied by a constant, where the loss starts high",
    reads=("start.loss",),
    basis="experiment",
    phase="forward",
)
def head_multiplied(history: History) -> Iterator[Symptom]:
    """The logits are what the head makes of its input times one number above 1, and the loss starts too high.

    A constant is no mistake as such: some models divide by the square root of the width, or have a temperature. So this
    is asked only where the loss starts above what theory allows, and judged only where it makes logits larger.
    """
    loss, error, classes = (history.last(f"start.{name}") for name in ("loss", "error", "classes"))
    if not math.isfinite(loss):
        raise NotChecked("the loss at step 0 is not finite")
    if loss <= math.log(classes) + LARGEST_EXCESS + 3 * error:
        return
    if not history.sites("head.factor"):
        raise NotChecked("no linear layer was seen to make the logits")
    for name, series in history.each("head.factor"):
        factor, rest = float(series.values[0]), history.last("head.rest", name)
        if rest < ROUNDING and factor > 1 + 2 * ROUNDING:
            text = (
                f"the logits are {factor:.3g} times what {name} makes of its input, and the loss starts at {loss:.2f}"
            )
            yield Symptom(at=name, since=0, seen=factor, expected="1", text=text)

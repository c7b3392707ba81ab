"""Is each layer computed with the weights that the optimiser changes, or with a copy that nobody refreshes?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

SAMPLE = 256  # elements of a parameter
LOOKS = 2  # after the first, with which they are compared
# Of a weight's size: four units in the last place of bfloat16. Of thousands of elements some pass a step of int8 too.
MOVED = 2.0**-6


@probe(
    "stale",
    title="Is each layer computed with the weights that the optimiser changes?",
    cost="each layer on one row, on examined steps; the first row's inputs are kept",
    examines=True,
    seldom=True,
)
class Stale(Probe):
    """Gives each layer the same input at every look, that of the first: its output has to change with its weights.

    Of layers that hold trainable parameters themselves, and are given one tensor of numbers. Records
    ``stale.same``, whether the output is that of the first look to the last bit, and ``stale.moved``: the root mean
    square of how far its weights have moved since then, over their own.
    """

    def lab_start(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        run.model.eval()
        with torch.no_grad():
            if not self._kept:
                self._kept = _first_look(run, step.batch.rows(1))
                if not self._kept:
                    raise NotChecked("no layer with weights of its own is given one tensor of numbers")
                return
            looks = {name: look for name, kept in self._kept.items() if (look := kept.look()) is not None}
        if looks:
            step.record_all("stale.same", tuple(looks), torch.stack([same for same, _ in looks.values()]))
            step.record_all("stale.moved", tuple(looks), torch.stack([moved for _, moved in looks.values()]))


@dataclass
class _Kept:
    """A layer, what it was given and what it then gave out, in two sums; and some of its weights as they were.

    Attributes:
        cast: How PyTorch cast by itself where the layer was called.
        around: And how it did so where the model was called. What it keeps of weights lives as long as that.
    """

    layer: nn.Module
    given: Tensor
    dtype: torch.dtype
    cast: tuple[str, torch.dtype, bool]
    around: tuple[str, torch.dtype, bool]
    sums: Tensor
    weights: Tensor

    def look(self) -> tuple[Tensor, Tensor] | None:
        """Whether it gives out the same now, and how far its weights have moved; None outside the same autocast."""
        if _casting(self.given.device.type) != self.around:
            return None
        try:
            with torch.autocast(*self.cast):
                answer = self.layer(self.given)
        except RuntimeError:  # what it was given is in another format than its weights
            return None
        if answer.dtype != self.dtype:
            return None
        same = (_sums(answer) == self.sums).all() & (self.given != 0).any()
        moved = (_sample(self.layer) - self.weights).square().mean().sqrt()
        return same.double(), moved / self.weights.square().mean().sqrt().clamp_min(1e-30)


def _first_look(run: Run, rows: Batch) -> dict[str, _Kept]:
    given: dict[str, tuple[Tensor, Any]] = {}
    layers = {
        name: module
        for name, module in run.model.named_modules()
        if any(p.requires_grad and p.numel() > 0 for p in module.parameters(recurse=False))
    }
    handles = [layer.register_forward_pre_hook(_keep(given, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run.call(rows)
    finally:
        for handle in handles:
            handle.remove()
    kept = {}
    for name, (value, cast) in given.items():
        with torch.autocast(*cast):
            answer = layers[name](value)
        if torch.is_tensor(answer):
            around = _casting(value.device.type)
            kept[name] = _Kept(layers[name], value, answer.dtype, cast, around, _sums(answer), _sample(layers[name]))
    return kept


def _keep(given: dict[str, tuple[Tensor, Any]], name: str) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and not kwargs and torch.is_tensor(args[0]) and args[0].is_floating_point():
            given.setdefault(name, (args[0].detach().clone(), _casting(args[0].device.type)))

    return hook


def _casting(device: str) -> tuple[str, torch.dtype, bool]:
    """What `torch.autocast` needs to cast as here."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def _sums(answer: Tensor) -> Tensor:  # -> [2]
    """Two sums in float64, which agree for outputs that are the same and hardly for others."""
    flat = answer.reshape(-1).double()
    return torch.stack([flat.sum(), (flat * torch.cos(torch.arange(len(flat), device=flat.device))).sum()])


def _sample(layer: nn.Module) -> Tensor:
    parts = []
    for p in layer.parameters(recurse=False):
        if p.requires_grad:
            flat = p.detach().reshape(-1)
            parts.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float())
    return torch.cat(parts)


@rule(
    "stale.same",
    title="What a layer gives out changes with its weights",
    reads=("stale.same", "stale.moved"),
    basis="experiment",
    phase="forward",
)
def stale_same(history: History) -> Iterator[Symptom]:
    """The same input gives the same output to the last bit, although the weights have moved.

    In each look in which they had moved by more than four units in the last place of bfloat16 since the first look,
    and in two such looks at least. Weights that are rounded to fewer bits on their way (quantised training) change
    more seldom, but some of thousands do.
    """
    judged = False
    for name, series in history.each("stale.same"):
        moved = history.series("stale.moved", name).values
        asked = moved > MOVED
        judged |= bool(np.count_nonzero(asked) >= LOOKS)
        if np.count_nonzero(asked) >= LOOKS and np.all(series.values[asked] == 1):
            step, share = int(series.steps[asked][0]), float(moved[asked][-1])
            yield Symptom(
                at=name,
                since=step,
                seen=share,
                expected="another output",
                text=f"{name} gives the same output for the same input, to the last bit, although its weights have "
                f"moved by {share:.1%} of their size",
            )
    if not judged:
        raise NotChecked("no layer's weights have moved far enough to tell")

"""What does each feed-forward layer's activation do? Its slope, entry by entry, says: exact, whatever the function."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lab import History, Run, Series, Step

ATTENTION = re.compile(r"attn|attention|mha", re.IGNORECASE)
ROWS, POSITIONS = 4, 128  # what is asked of a neuron is exact, or a share of all tokens: so many are enough
LOOKS = 3
ENTRIES = 256  # of fewer, an activation may leave all as they are by chance: a ReLU half of them, 2^-256
ROUNDING = 1e-6
EARLIER = f"fewer than {LOOKS} looks at a feed-forward layer: what happens once may be chance"


@probe(
    "feed-forward",
    title="What does the activation of each feed-forward layer let through?",
    cost="a forward pass on four rows, or on one that is long, and the slope of each activation",
    examines=True,
    seldom=True,
)
class FeedForward(Probe):
    """Differentiates what enters the last matrix of each feed-forward layer by what leaves the first.

    A feed-forward layer is a matrix from C to F and a later one from F back to C, with F > C, that are not parts of an
    attention layer; two matrices side by side, where it is gated. The model is in evaluation mode. Records, for each:

    ``ffn.bend``: how far the activation is from passing on what it is given (0: there is none).
    ``ffn.flat``: the share of entries with a slope of exactly 0 that equal the largest or the smallest of all; 0 where
    less than a tenth are the one or the other, as a ReLU is flat on one side only.
    ``ffn.silent``: the share of neurons that are exactly 0, with a slope of exactly 0, at every token.
    ``ffn.cut``: the share of neurons that are exactly 0 at every token, although at one at least the activation is
    given more than by another neuron that is not 0; ``ffn.cut_always``: those that were so in the last three looks.
    """

    def lab_start(self) -> None:
        self._cut: dict[str, list[Tensor]] = {}

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        run.model.eval()
        with torch.enable_grad(), _Layers(run.model) as layers:
            run.call(step.batch.rows(ROWS, enough=POSITIONS))
        found = {name: layer for name, layer in layers.found.items() if layer.hidden.numel() >= ENTRIES}
        if not found:
            raise NotChecked("no feed-forward layer in this model that can be differentiated")
        slopes = _slopes(list(found.values()))
        for (name, layer), slope in zip(found.items(), slopes, strict=True):
            if slope is not None:
                self._record(step, name, layer, slope)

    def _record(self, step: Step, name: str, layer: _Layer, slopes: Tensor) -> None:
        width = layer.hidden.shape[-1]
        hidden = layer.hidden.detach().reshape(-1, width)  # [N F]
        given = layer.given.reshape(len(layer.before), -1, width)  # [K N F], K = 2 where it is gated
        slopes = slopes.reshape(given.shape)
        none, still = hidden == 0, (slopes == 0).all(0)  # [N F]
        bend = torch.stack([(slopes - 1).abs().amax(), (hidden - given).abs().amax() / given.abs().amax()]).amax()
        step.record("ffn.bend", bend, name)
        ends = torch.stack([(still & (hidden == end)).float().mean() for end in (hidden.amin(), hidden.amax())])
        both = (ends.amin() > 0.1) & (~none).any()  # where all are 0, both ends are, and it is silent
        step.record("ffn.flat", ends.sum().clamp_max(1) * both, name)
        step.record("ffn.silent", (none & still).all(0).float().mean(), name)
        # An activation is one function for all neurons: what is 0 while less makes another neuron speak was set to 0.
        least = given.amin(0)
        speaks = torch.where(~none & (least > 0), least, torch.inf).amin(-1, keepdim=True)  # [N 1]
        cut = none.all(0) & (none & (least >= speaks)).any(0)  # [F]
        looks = self._cut.setdefault(name, [])
        looks.append(cut)
        del looks[:-LOOKS]
        step.record("ffn.cut", cut.float().mean(), name)
        if len(looks) == LOOKS:
            step.record("ffn.cut_always", torch.stack(looks).all(0).float().mean(), name)


@dataclass
class _Layer:
    """What the activation of one layer is given, [... F] once or twice, and what it makes of it, [... F]."""

    before: list[Tensor]
    hidden: Tensor

    @property
    def given(self) -> Tensor:
        return torch.stack([part.detach() for part in self.before])


class _Layers:
    """While in the block, cuts the graph after each matrix that widens, and finds the one that narrows again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, _Layer] = {}
        self._open: list[tuple[str, int, Tensor]] = []  # name, width of the input, output
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        inside = "\n"
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            # The outermost: an adapter that wraps a matrix adds to what it gives.
            if torch.is_tensor(weight) and weight.dim() == 2 and not name.startswith(inside):
                inside = f"{name}."
                self._handles.append(module.register_forward_pre_hook(self._narrows(name)))
                self._handles.append(module.register_forward_hook(self._widens(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._open.clear()

    def _widens(self, name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[object, ...], output: object) -> Tensor | None:
            x = args[0] if args else None
            if not (torch.is_tensor(x) and torch.is_tensor(output) and x.is_floating_point()):
                return None
            if output.shape[-1] <= x.shape[-1]:
                return None
            leaf: Tensor = output.detach().requires_grad_()
            self._open.append((name, x.shape[-1], leaf))
            return leaf.clone()  # an activation may work in place, which a leaf does not allow

        return hook

    def _narrows(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            x = args[0] if args else None
            if not (torch.is_tensor(x) and x.is_floating_point() and x.requires_grad):
                return
            back = module.weight.numel() // x.shape[-1]  # type: ignore[operator]
            mine = [(n, leaf) for n, width, leaf in self._open if width == back and leaf.shape == x.shape]
            if not mine:
                return
            self._open = [part for part in self._open if not any(part[2] is leaf for _, leaf in mine)]
            place = _common([name, *(n for n, _ in mine)])
            kind = type(self.model.get_submodule(place)).__name__
            if not ATTENTION.search(f"{place.rpartition('.')[2]} {kind}"):
                self.found.setdefault(place or name, _Layer([leaf for _, leaf in mine], x))

        return hook


def _common(names: list[str]) -> str:
    """The innermost module that holds all of them."""
    first, *others = [name.split(".")[:-1] for name in names]
    depth = 0
    while depth < len(first) and all(path[: depth + 1] == first[: depth + 1] for path in others):
        depth += 1
    return ".".join(first[:depth])


def _slopes(layers: list[_Layer]) -> list[Tensor | None]:
    """The slope of each activation at each entry, [K ... F]; None where one has nothing to do with the other."""
    # Not the plain sum: where a norm stands behind the activation, its sum is constant.
    directions = [_direction(layer.hidden) for layer in layers]
    total = torch.stack(
        [(layer.hidden * way).sum().float() for layer, way in zip(layers, directions, strict=True)]
    ).sum()
    grads = iter(torch.autograd.grad(total, [leaf for layer in layers for leaf in layer.before], allow_unused=True))
    found: list[Tensor | None] = []
    for layer, way in zip(layers, directions, strict=True):
        mine = [next(grads) for _ in layer.before]
        kept = [grad for grad in mine if grad is not None]
        layer.before = [leaf for leaf, grad in zip(layer.before, mine, strict=True) if grad is not None]
        found.append(torch.stack(kept) / way if kept else None)
    return found


def _direction(like: Tensor) -> Tensor:
    """Weights from 1/2 to 3/2."""
    count = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (1 + torch.cos(count) / 2).view(like.shape).to(like.dtype)


# ---------------------------------------------------------------- rules


def _since(series: Series, wrong: NDArray[np.bool_]) -> int | None:
    """The step from which a look and all after it are wrong, of three looks at least."""
    start = series.until_now(wrong, LOOKS)
    return None if start is None else int(series.steps[start])


def _looks(history: History, metric: str) -> Iterator[tuple[str, Series]]:
    series = [(name, found) for name, s in history.each(metric) if len(found := s.finite)]
    if not series:
        raise NotChecked(EARLIER)
    yield from series


@rule(
    "ffn.linear",
    title="Every feed-forward layer has an activation",
    reads=("ffn.bend",),
    basis="experiment",
    phase="forward",
)
def ffn_linear(history: History) -> Iterator[Symptom]:
    """Between a matrix that widens and one that narrows back, something is bent: else one small matrix would do.

    What enters the second equals what left the first, and has a slope of 1, at each entry, but for rounding. A factor
    of low rank narrows first, and two matrices of one width may be meant; neither is asked. An activation that is
    learned may start as the identity; so it has to stay so for three looks.
    """
    for name, series in _looks(history, "ffn.bend"):
        if (step := _since(series, series.values <= ROUNDING)) is not None:
            text = f"{name} multiplies by one matrix after the other, with nothing between them, from step {step}"
            yield Symptom(at=name, since=step, seen=0.0, expected="above 0", text=text)


@rule(
    "ffn.flat",
    title="No activation is flat where almost all of its values lie",
    reads=("ffn.flat",),
    basis="theory",
    phase="forward",
)
def ffn_flat(history: History) -> Iterator[Symptom]:
    """A slope of exactly 0 at both bounds of what comes out: a function that is bounded, and given far too much.

    Inputs of variance 2, that of the largest standard initialisation, are outside of -1 to 1, the narrowest bounds of
    any named activation (hardtanh), in 48% of all cases; so 90%, in each of three looks, is beyond them all.
    """
    for name, series in _looks(history, "ffn.flat"):
        if (step := _since(series, series.values > 0.9)) is not None:
            seen = float(series.values[-1])
            text = f"{seen:.0%} of the hidden values of {name} are at one of two bounds, where the slope is exactly 0"
            yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "ffn.silent",
    title="No feed-forward layer is silent",
    reads=("ffn.silent",),
    basis="experiment",
    phase="forward",
)
def ffn_silent(history: History) -> Iterator[Symptom]:
    """All neurons exactly 0, with a slope of exactly 0, at every token of three looks: nothing passes, nothing learns.

    All, as single neurons of a healthy ReLU network may be dead, and most silent at most tokens.
    """
    for name, series in _looks(history, "ffn.silent"):
        if (step := _since(series, series.values == 1)) is not None:
            text = f"no neuron of {name} gives out anything at any token, or has a gradient, from step {step}"
            yield Symptom(at=name, since=step, seen=1.0, expected="0", text=text)


@rule(
    "ffn.cut",
    title="No neuron is set to 0 once and for all",
    reads=("ffn.cut",),
    basis="experiment",
    phase="forward",
)
def ffn_cut(history: History) -> Iterator[Symptom]:
    """An activation is one function: it does not give 0 to one neuron and more to another that is given less.

    Not in evaluation, where no dropout acts. The same neurons have to be 0 at every token of three looks; where only
    the largest may pass, it is the smaller ones that are 0, which is not asked.
    """
    judged = False
    for name, series in history.each("ffn.cut_always"):
        judged = True
        always, now = series.finite, history.series("ffn.cut", name).finite
        if found := always.first(always.values > 0):
            early = now.values[now.steps <= found[0]]
            whole = np.flatnonzero(early == 0)
            step = int(now.steps[int(whole[-1]) + 1 if len(whole) else 0])
            text = f"the same {found[1]:.0%} of the neurons of {name} are 0 at every token, whatever they are given"
            yield Symptom(at=name, since=step, seen=found[1], expected="0", text=text)
        else:
            now.until_now(now.values > 0, LOOKS)  # looks again while there are fewer
    if not judged:
        raise NotChecked(EARLIER)

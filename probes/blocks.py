"""Is every part of every block on the path, and do tokens stay apart on it?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

NORM = re.compile(r"norm", re.IGNORECASE)
NORMED = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
ROWS, POSITIONS = 2, 128  # so many positions are enough
LOOKS = 3
CUT = 1e-4  # of the largest output: so much a parameter without a gradient has to change it
APART = 1e-3
ROUNDING = 1e-6


@probe(
    "blocks",
    title="Is every block on the path, and every norm in it, and do tokens stay apart?",
    cost="forward and backward on two rows, or on one that is long",
    examines=True,
    seldom=True,
)
class Blocks(Probe):
    """Notes which weights have a gradient, then calls the model in evaluation mode, and notes what it calls and uses.

    A block is a member of a list of modules, and holds at least two norms beside its matrices. Records
    ``path.skipped`` (1: no weight of the block has a gradient, and nothing in it is called, while other blocks of the
    list are), ``path.ignored`` (1: a block is called, the model's output does not depend on what it gives out, nothing
    in it has a gradient in training, and a block behind it has), ``path.unheard`` (1: so with a norm in a block on
    whose output the model's depends), and ``stream.apart``: the largest distance between an element at the
    first position and at any other, of what a block gives out, over the largest element; with ``stream.alike`` (1: that
    is 0 but for rounding, and of what the block is given it is not).
    """

    def lab_start(self, run: Run) -> None:
        self._lists = list(lists_of_blocks(run.model))
        self._graded: tuple[int, set[str]] = (-1, set())

    def lab_before_update(self, run: Run, step: Step) -> None:
        if step.thorough and self._lists:
            self._graded = step.index, {name for name, p in run.parameters.items() if p.grad is not None}

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        if not self._lists:
            raise NotChecked("no list of blocks with norms in this model")
        calls = _Calls(run.model, {name for names in self._lists for name in names})
        run.model.eval()
        with torch.enable_grad(), calls:
            answer = run.call(step.batch.rows(ROWS, enough=POSITIONS))
            unheard = self._unheard(answer, calls.added) if self._graded[0] == step.index else {}
        if calls.apart:
            sites = tuple(calls.apart)
            given, out = (torch.stack(values) for values in zip(*calls.apart.values(), strict=True))
            step.record_all("stream.apart", sites, out)
            alike = ((out <= ROUNDING) & (given > APART)).float()
            step.record_all("stream.alike", sites, torch.where((out + given).isfinite(), alike, torch.nan))
        if self._graded[0] == step.index and self._graded[1]:
            for names in self._lists:
                self._skipped(run, step, names, calls.called)
                self._ignored(step, names, unheard)
            blocks = {name for names in self._lists for name in names}
            for name in unheard.keys() - blocks:
                # What is inside a block that nobody hears only follows.
                around = any(unheard.get(block) for block in blocks if name.startswith(f"{block}."))
                step.record("path.unheard", float(unheard[name] and not around), name)

    def _ignored(self, step: Step, names: list[str], unheard: dict[str, bool]) -> None:
        """Of blocks that are called; behind the last that is heard there may be more on purpose, for a later layer."""
        called = [name for name in names if name in unheard]
        heard = [name for name in called if not unheard[name]]
        for place, name in enumerate(called):
            step.record("path.ignored", float(unheard[name] and any(each in heard for each in called[place:])), name)

    def _skipped(self, run: Run, step: Step, names: list[str], called: set[str]) -> None:
        graded = self._graded[1]
        weights = {name: [key for key in run.parameters if key.startswith(f"{name}.")] for name in names}
        used = [name for name in names if graded.intersection(weights[name])]
        idle = [
            name
            for name in names
            if weights[name]
            and not graded.intersection(weights[name])
            and not any(key.startswith(f"{name}.") for key in called)
        ]
        for name in (*used, *idle):
            # Where most of a list rest, it may be meant: a choice of one of several.
            step.record("path.skipped", float(name in idle and len(used) >= len(idle)), name)

    def _unheard(self, answer: Tensor, norms: dict[str, Tensor]) -> dict[str, bool]:
        """Whether the answer depends on a norm or block neither here nor in training.

        The graph may be made again on the way.
        """
        if not norms or not answer.requires_grad:
            return {}
        ways = torch.cos(torch.arange(answer.numel(), device=answer.device)).view(answer.shape)
        grads = torch.autograd.grad((answer * ways).sum(), list(norms.values()), allow_unused=True)
        trains = {name: any(key.startswith(f"{name}.") for key in self._graded[1]) for name in norms}
        return {name: grad is None and not trains[name] for name, grad in zip(norms, grads, strict=True)}


def lists_of_blocks(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the blocks of each list of two at least."""
    for path, parent in model.named_modules():
        if isinstance(parent, torch.nn.ModuleList):
            names = [f"{path}.{i}" if path else i for i, block in parent.named_children() if _is_block(block)]
            if len(names) >= 2:
                yield names


def _is_block(module: nn.Module) -> bool:
    """Whether it holds two norms, and a matrix: an expert or an adapter, of which some may rest, has fewer."""
    norms = [m for m in module.modules() if NORM.search(type(m).__name__) and not list(m.children())]
    return len(norms) >= 2 and any(p.dim() >= 2 for p in module.parameters())


class _Calls:
    """While in the block, notes which modules of the blocks are called; adds a 0 to what each norm and block gives."""

    def __init__(self, model: nn.Module, blocks: set[str]) -> None:
        self.model, self.blocks = model, blocks
        self.called: set[str] = set()
        self.apart: dict[str, tuple[Tensor, Tensor]] = {}
        self.added: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            if any(name == block or name.startswith(f"{block}.") for block in self.blocks):
                self._handles.append(module.register_forward_hook(self._note(name)))
            if name in self.blocks:
                self._handles.append(module.register_forward_hook(_compare(self.apart, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., object]:
        def hook(module: nn.Module, _args: object, output: object) -> object:
            self.called.add(name)
            # Without a graph, as in a block that is checkpointed the older way, it cannot be told what is used.
            if not (name in self.blocks or NORMED.search(type(module).__name__)) or not torch.is_grad_enabled():
                return None
            if type(output) is tuple and output:
                first = self._added(name, output[0])
                return None if first is None else (first, *output[1:])
            return self._added(name, output)

        return hook

    def _added(self, name: str, output: object) -> Tensor | None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        if name in self.added:  # called again, as on the way back through what is checkpointed
            known = self.added[name]
            return output + known if known.shape == output.shape else None
        # Added, not put in its place: what came before has to reach the output through norms on the stream.
        self.added[name] = nothing = torch.zeros_like(output, requires_grad=True)
        return output + nothing


def _compare(apart: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., None]:
    def hook(_m: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        out = output[0] if isinstance(output, tuple) and output else output
        if not torch.is_tensor(out) or out.dim() != 3 or out.shape[1] < 2 or name in apart:
            return
        for x in (*args, *kwargs.values()):
            if torch.is_tensor(x) and x.shape == out.shape and x.is_floating_point():
                apart[name] = _apart(x.detach()), _apart(out.detach())
                return

    return hook


def _apart(x: Tensor) -> Tensor:  # [R T C] -> []
    return (x - x[:, :1]).abs().amax().float() / x.abs().amax().float()


def _since(history: History, metric: str, name: str) -> int | None:
    """The step from which the metric is 1 in each look, of three at least."""
    series = history.series(metric, name).finite
    start = series.until_now(series.values == 1, LOOKS)
    return None if start is None else int(series.steps[start])


def _enough(history: History, metric: str) -> None:
    if max(len(series.finite) for _, series in history.each(metric)) < LOOKS:
        raise NotChecked(f"fewer than {LOOKS} looks at a block: what is left out once may be chance")


@rule(
    "path.skipped",
    title="No block is left out",
    reads=("path.skipped",),
    basis="experiment",
    phase="forward",
)
def path_skipped(history: History) -> Iterator[Symptom]:
    """A block whose like are called, in which nothing is called, in evaluation or, as no gradient shows, in training.

    Layers that are dropped at random are there in evaluation, and in some of three looks.
    """
    _enough(history, "path.skipped")
    for name in history.sites("path.skipped"):
        if (step := _since(history, "path.skipped", name)) is not None:
            text = f"nothing in {name} is called, and none of its weights has a gradient, from step {step}"
            yield Symptom(at=name, since=step, seen=1.0, expected="0", text=text)


@rule(
    "path.ignored",
    title="What a block gives out is used",
    reads=("path.ignored",),
    basis="experiment",
    phase="forward",
)
def path_ignored(history: History) -> Iterator[Symptom]:
    """A block is called, nothing depends on what it gives out, and a block of the same list behind it is heard.

    In three looks, in evaluation and, as no gradient shows, in training. What stands behind the last block that is
    heard may be meant: a model whose last layers are left out, or which gives out what a layer before gave.
    """
    _enough(history, "path.ignored")
    if any(np.any(series.finite.values > CUT) for _, series in history.each("backward.cut")):
        raise NotChecked("the graph is cut: what the output depends on cannot be told by derivatives")
    for name in history.sites("path.ignored"):
        if (step := _since(history, "path.ignored", name)) is not None:
            text = f"{name} is called, and nothing depends on what it gives out, from step {step}"
            yield Symptom(at=name, since=step, seen=1.0, expected="0", text=text)


@rule(
    "path.unheard",
    title="What a norm gives out is used",
    reads=("path.unheard",),
    basis="experiment",
    phase="forward",
)
def path_unheard(history: History) -> Iterator[Symptom]:
    """A norm that is called, and on whose output nothing depends: not the model's, nor, without a gradient, the loss.

    In evaluation, where no branch is left out at random. Where the graph is cut, what is before the cut may be heard,
    and leaves no derivative.
    """
    _enough(history, "path.unheard")
    if any(np.any(series.finite.values > CUT) for _, series in history.each("backward.cut")):
        raise NotChecked("the graph is cut: what the output depends on cannot be told by derivatives")
    for name in history.sites("path.unheard"):
        if (step := _since(history, "path.unheard", name)) is not None:
            text = f"{name} is called, and nothing depends on what it gives out, from step {step}"
            yield Symptom(at=name, since=step, seen=1.0, expected="0", text=text)


@rule(
    "stream.collapsed",
    title="No block makes all tokens alike",
    reads=("stream.alike",),
    basis="experiment",
    phase="forward",
)
def stream_collapsed(history: History) -> Iterator[Symptom]:
    """What differs between positions on the way in differs on the way out of ``x + f(x)``; at rounding it is gone."""
    _enough(history, "stream.alike")
    for name in history.sites("stream.alike"):
        if (step := _since(history, "stream.alike", name)) is not None:
            text = f"{name} gives out the same vector at every position, though it is given different ones"
            yield Symptom(at=name, since=step, seen=0.0, expected="above 0", text=text)

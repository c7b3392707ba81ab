"""Where a training step is at each moment: in which module, forward or backward, or in which part of the loop.

Modules are known by hooks. Backward it is by autograd's own numbers: PyTorch numbers the nodes of a graph as they are
made, and goes through them from the newest to the oldest. The nodes that a module's call made are those between its
first number and its last; so a hook on the first node of each stretch tells when the way back enters a module.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lab.profiling.costs import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Direction = Literal["", "forward", "backward", "no gradient"]


class Place(NamedTuple):
    """A module on a way through the model, or a part of the loop, which has no direction."""

    name: str
    direction: Direction = ""


LOOP = Place("loop")  # between all others: what the training loop does itself
DATA, LOSS, UPDATE = Place("data"), Place("loss"), Place("optimizer")
WATCHING = Place("watching")  # what measuring itself takes, which is no part of the step
LARGEST = 2**64 - 1  # the number of the nodes that add up the gradients of parameters, and are no module's


class Places:
    """While in the block, can follow a model through training steps; it does so between `follow` and `rest`.

    Args:
        model: Whose modules are told apart.
        but: Modules that must not be given hooks, nor those in them: what they take is their parent's.

    Attributes:
        now: The place.
        entered: Since `follow`, how often each was entered, but on the way back.
    """

    def __init__(self, model: nn.Module, but: Collection[nn.Module] = ()) -> None:
        inside = {inner for module in but for inner in module.modules()}
        self._named = {module: name_of(path, module) for path, module in model.named_modules() if module not in inside}
        self.now = LOOP
        self.entered: Counter[Place] = Counter()
        self._tell: Callable[[Place], None] = _nobody
        self._outer: list[Place] = []
        self._calls: list[tuple[int, int, str]] = []  # first and last number, and whose, of the calls that ended
        self._begun: list[int] = []
        self._ending = self._resting = False
        self._whole, self._step = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Once for all steps: a step may begin inside such a hook, where no other can be made or removed.
        self._whole.callback(register_optimizer_step_pre_hook(self._updates).remove)
        self._whole.callback(register_optimizer_step_post_hook(self._updated).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self._whole.close()

    def follow(self, tell: Callable[[Place], None]) -> None:
        """Call ``tell`` with each place that is entered, from now on."""
        self.rest()
        self._tell, self.now = tell, LOOP
        self.entered.clear()
        for module in self._named:
            self._step.callback(module.register_forward_pre_hook(self._begins, prepend=True).remove)
            self._step.callback(module.register_forward_hook(self._ends, always_call=True).remove)
        fetch = _BaseDataLoaderIter.__next__

        def following(loader: Any) -> Any:
            with self.within(DATA):
                return fetch(loader)

        self._step.callback(setattr, _BaseDataLoaderIter, "__next__", fetch)
        _BaseDataLoaderIter.__next__ = following  # type: ignore[method-assign, assignment]

    def rest(self) -> None:
        """Follow nothing any more."""
        self._step.close()
        self._tell = _nobody
        self._outer.clear()
        self._calls.clear()
        self._begun.clear()
        self._ending = False

    @property
    def following(self) -> bool:
        """Whether it follows the model now."""
        return self._tell is not _nobody

    def _updates(self, *_: Any) -> None:
        if self.following:
            self.enter(UPDATE)

    def _updated(self, *_: Any) -> None:
        if self.following and self.now == UPDATE:
            self.leave()

    def enter(self, place: Place) -> None:
        """Go to a place, from which `leave` leads back."""
        self._outer.append(self.now)
        self.entered[place] += 1
        self.at(place)

    def leave(self) -> None:
        """Go back to where the last `enter` was."""
        self.at(self._outer.pop() if self._outer else LOOP)

    def at(self, place: Place) -> None:
        """Go to a place."""
        self.now = place
        self._tell(place)

    @contextlib.contextmanager
    def within(self, place: Place) -> Iterator[None]:
        """Be at a place for as long as the block lasts."""
        self.enter(place)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Follow nothing inside the block."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def _begins(self, module: nn.Module, _args: Any) -> None:
        if self._resting:
            return
        self._begun.append(_newest())
        self.enter(Place(self._named[module], "forward" if torch.is_grad_enabled() else "no gradient"))

    def _ends(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._resting or not self._begun:
            return
        first = self._begun.pop()
        self._calls.append((first, _newest(), self._named[module]))
        self.leave()
        if not self._begun:
            with self.within(WATCHING):
                self._follow_back(output)
            if self.now == LOOP and torch.is_grad_enabled():
                self.at(LOSS)  # until the way back begins, or something else does

    def _follow_back(self, output: Any) -> None:
        """Tell, when the gradients of a call pass, which module they are in."""
        calls, self._calls = self._calls, []
        begun = calls[-1][0]
        nodes = sorted(_nodes_since(begun, output), key=lambda node: -_number(node))
        # The innermost call ended first.
        whose = _owners([*map(_number, nodes)], calls)
        before = None
        for node, name in zip(nodes, whose, strict=True):
            if name != before:
                node.register_prehook(self._passing(Place(name, "backward")))
            before = name

    def _passing(self, place: Place) -> Callable[[Any], None]:
        def hook(_gradients: Any) -> None:
            if not self._ending:
                self._ending = True
                torch.autograd.Variable._execution_engine.queue_callback(self._back)  # noqa: SLF001
            self.at(place)

        return hook

    def _back(self) -> None:
        self._ending = False
        self.at(self._outer[-1] if self._outer else LOOP)


def _nobody(_: Place) -> None:
    """Nobody listens."""


def name_of(path: str, module: nn.Module) -> str:
    """The place in a model that a module is: the core of an attention layer of the lab is its parent's."""
    return (path.rpartition(".")[0] if getattr(module, "transparent", False) else path) or "model"


def _newest() -> int:
    """The number that the next node of a graph gets."""
    return int(torch._C._autograd._get_sequence_nr())  # noqa: SLF001 - torch offers no other way to ask


def _number(node: Any) -> int:
    return int(node._sequence_nr())  # noqa: SLF001


def _nodes_since(first: int, output: Any) -> list[Any]:
    """The nodes that lead to an output and were made since, without those that add up gradients of parameters."""
    found: dict[Any, None] = {}
    waiting = [value.grad_fn for value in tensors(output) if value.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found or not first <= _number(node) < LARGEST:
            continue
        found[node] = None
        waiting += [each for each, _ in node.next_functions if each is not None]
    return list(found)


def _owners(numbers: list[int], calls: list[tuple[int, int, str]]) -> list[str]:
    """For numbers that fall, the innermost call that each lies in. A call ends after those within it."""
    waiting = sorted(calls, key=lambda call: (call[1], -call[0]))  # what ends last, and holds others, is taken first
    inside: list[tuple[int, int, str]] = []
    found = []
    for number in numbers:
        while inside and inside[-1][0] > number:
            inside.pop()
        while waiting and waiting[-1][1] > number:
            call = waiting.pop()
            if call[0] <= number:
                inside.append(call)
        found.append(inside[-1][2] if inside else "model")
    return found

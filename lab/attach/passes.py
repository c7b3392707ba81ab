"""Backward passes whose gradients are gone before an update has used them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab.context import Run, Step


class Passes:
    """Follows the backward passes of one step, from the parts of an accumulated batch to the update.

    A pass counts as cleared if every gradient that it left was None or 0 when the next one began, and nothing tells
    what it was for: the weights are the same, no other optimiser took a step, the model was called for the next, and
    what it was called with asks for no gradient (as for an adversarial example). And if the update then reads what the
    last pass left: who combines the gradients of several losses puts new ones in their place.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._others = 0  # updates by other optimisers
        self._forget()

    def _forget(self) -> None:
        self._called = False
        self._left: list[tuple[nn.Parameter, Tensor, int]] = []  # the gradients of the pass before, and their version
        self._about: tuple[int, int] = (0, 0)
        self._explained = False

    def begin(self) -> None:
        """A step begins."""
        self._forget()

    def called(self) -> None:
        """The model is called for training."""
        self._called = True

    def other_update(self) -> None:
        """Another optimiser took a step."""
        self._others += 1

    def backward(self, step: Step) -> None:
        """A backward pass begins."""
        if self._left and self._called and not self._explained and self._about == self._state():
            step.cleared += all(_gone(*kept) for kept in self._left)
        self._left.clear()

    def propagated(self, step: Step) -> None:
        """It has ended."""
        step.passes += 1
        with torch.no_grad():
            grads = ((p, p.grad) for p in self.run.parameters.values())
            self._left = [(p, grad, grad._version) for p, grad in grads if grad is not None]
        self._about, self._called = self._state(), False
        batch = step.batch
        given = (*batch.args, *batch.kwargs.values()) if batch is not None else ()
        self._explained = any(t.requires_grad for t in _tensors(given))

    def update(self, step: Step) -> None:
        """The weights are about to change."""
        if step.cleared and not all(p.grad is not None and p.grad.data_ptr() == g.data_ptr() for p, g, _ in self._left):
            step.cleared = 0

    def _state(self) -> tuple[int, int]:
        return sum(p._version for p in self.run.parameters.values()), self._others


def _gone(p: nn.Parameter, left: Tensor, version: int) -> bool:
    if p.grad is None:
        return True
    # On a device, looking at values would make the host wait.
    return p.grad is left and left._version != version and left.device.type == "cpu" and not bool(left.any())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())

"""Functions that are compiled for what changes from call to call."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

from lab import Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Run, Step

RECOMPILATION = Cause(
    id="performance.recompilation",
    title="A compiled function is compiled again and again",
    must=("compilation.again",),
    place="loop",
    repair="Give a compiled function tensors for what changes from call to call: torch.tensor(step), not the number "
    "step; a learning rate that is a tensor. Leave dynamic at its default for shapes that change.",
    refute="After some steps nothing is compiled any more.",
    look="TORCH_LOGS=recompiles names each function and the guard that failed: Python numbers, attributes that count, "
    "shapes under dynamic=False.",
    source="PyTorch documentation: torch.compile, recompilation",
)


@fault(
    "performance.recompilation",
    title="A compiled function is given another number in each step",
    cause="performance.recompilation",
    moves="compilation.steps",
    repair=RECOMPILATION.repair,
)
class Recompilation(Fault):
    """Has a loss weighted by a compiled function of the step, with a weight of 1. It is compiled without a compiler."""

    at: str = "loop"

    def lab_start(self) -> None:
        # A function of its own in each run: PyTorch keeps what it has compiled for as long as the code exists.
        own = types.FunctionType(_weighted.__code__.replace(), {"__builtins__": __builtins__})
        self._weighted = torch.compile(own, backend="eager", dynamic=False)

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if step.mode == "train" and self.active(run):
            loss = self._weighted(loss, step.index)
        return loss


def _weighted(loss: Tensor, step: int) -> Tensor:
    return loss * (1 + 0 * step)

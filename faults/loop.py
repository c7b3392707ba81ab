"""Training loops that leave a call out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Cause, Fault, fault

if TYPE_CHECKING:
    from lab import Run

NO_ZERO_GRAD = Cause(
    id="loop.no_zero_grad",
    title="Gradients are never cleared",
    must=("gradient.carried",),
    place="loop",
    repair="Call optimizer.zero_grad() once for each optimizer.step(), before the first backward of the next step.",
    refute="Every gradient is None or 0 when the first backward after an update begins.",
    look="Where zero_grad() stands, and whether an if leaves it out.",
    source="Humbatova et al., 2020 (taxonomy of deep learning faults); PyTorch tutorials: zeroing out gradients",
)


@fault(
    "loop.no_zero_grad",
    title="zero_grad is never called",
    cause="loop.no_zero_grad",
    moves="gradient.carried",
    repair=NO_ZERO_GRAD.repair,
)
class NoZeroGrad(Fault):
    """Answers `lab_zero_grad` and does nothing: each step's gradients are added to all before."""

    at: str = "loop"

    def lab_zero_grad(self, run: Run) -> bool | None:
        return True if self.active(run) else None

"""Training loops that leave a call out, or make it in the wrong place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Cause, Fault, fault

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

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

ZERO_GRAD_LATE = Cause(
    id="loop.zero_grad_late",
    title="Gradients are cleared between the backward pass and the update",
    must=("arrival.none",),
    may=("flow.zero",),  # what is 0 and has no gradient left
    place="loop",
    repair="Order the calls: optimizer.zero_grad(), loss.backward(), clip_grad_norm_(), optimizer.step(). What "
    "backward() adds up has to be there when step() reads it.",
    refute="p.grad is neither None nor 0 for some parameter when optimizer.step() is called.",
    look="What stands between backward() and step(): zero_grad() of the optimiser, of the model, or grad = None.",
    source="PyTorch tutorials: optimizing model parameters (zero_grad, backward, step)",
)

PARTS_CLEARED = Cause(
    id="loop.parts_cleared",
    title="Gradients of the parts of a batch are cleared before they are added up",
    must=("passes.cleared",),
    place="loop",
    repair="Call optimizer.zero_grad() once for each optimizer.step(), not before each part: backward() adds to what "
    "is there, and that is how the parts become one batch.",
    refute="When the second backward pass of a step begins, p.grad of some parameter is neither None nor 0.",
    look="Where zero_grad() stands: inside the loop over the parts, or in a function that is called for each of them.",
    source="bytetriper/RAE issue 67; pytorch/torchtitan pull request 3575; tatsu-lab/alpaca_farm issue 57",
)

NO_STEP = Cause(
    id="loop.no_step",
    title="The optimiser is never told to take its step",
    must=("update.calls*",),
    may=("movement.none", "flow.zero"),
    place="loop",
    repair="Call optimizer.step() after the backward pass of each step (scaler.step(optimizer) under loss scaling). A "
    "scheduler's step() changes the learning rate and no weight.",
    refute="The state of the optimiser counts a step more after each step of training.",
    look="The condition under which step() is called: with accumulation (i + 1) % parts == 0, which an epoch shorter "
    "than the parts never meets; and whether it is the step() of the optimiser.",
    source="Humbatova et al., 2020 (taxonomy of deep learning faults: training process)",
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


@fault(
    "loop.zero_grad_late",
    title="zero_grad is called after the backward pass, and before the update",
    cause="loop.zero_grad_late",
    moves="arrival.share",
    repair=ZERO_GRAD_LATE.repair,
)
class ZeroGradLate(Fault):
    """Drops the gradients once they have been clipped: the optimiser finds none."""

    at: str = "loop"

    def lab_clip(self, run: Run) -> Generator[None, Tensor, Tensor]:
        norm = yield
        if self.active(run):
            run.optimizer.zero_grad(set_to_none=True)
        return norm


@fault(
    "loop.no_step",
    title="optimizer.step() is never called",
    cause="loop.no_step",
    moves="update.calls",
    repair=NO_STEP.repair,
)
class NoStep(Fault):
    """Answers `lab_update` and does nothing: gradients are made and cleared, and no weight changes."""

    at: str = "loop"

    def lab_update(self, run: Run) -> bool | None:
        return True if self.active(run) else None

"""Gradients that are clipped in vain, or at the wrong moment, and the causes behind that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Run, Step

INEFFECTIVE = Cause(
    id="clip.ineffective",
    title="Clipping does not reach the gradients that are used",
    must=("clip.without_effect",),
    place="clipping",
    repair="Call clip_grad_norm_(model.parameters(), limit) between backward() and optimizer.step(). "
    "model.parameters() is a generator and can be gone through once: kept in a variable, it is empty the second time; "
    "keep list(model.parameters()).",
    refute="After clipping, the joint norm of all gradients is at most the limit, and what it answers is their norm.",
    look="What is handed to clip_grad_norm_, what it returns, and where it stands.",
    source="PyTorch documentation: clip_grad_norm_, its warning of 'an empty generator'",
)

BEFORE_UNSCALE = Cause(
    id="clip.before_unscale",
    title="Gradients are clipped while they still hold the scale of the loss",
    must=("clip.scaled",),
    place="clipping",
    repair="Call scaler.unscale_(optimizer) before clip_grad_norm_; scaler.step() notices and does not divide again. "
    "Gradients that are averaged over parts or processes by hand are divided before they are clipped, too.",
    refute="Where the norm was above the limit, it is the limit when the optimiser steps.",
    look="The order of unscale_ and clip_grad_norm_; norms of gradients of ten thousand and more.",
    source="PyTorch documentation: automatic mixed precision examples, working with unscaled gradients",
)


@fault(
    "clip.ineffective",
    title="Clipping is handed a generator that is used up",
    cause="clip.ineffective",
    moves="clip.norm",
    repair=INEFFECTIVE.repair,
)
class Ineffective(Fault):
    """Answers the norm of no gradient, 0, and clips none."""

    at: str = "clipping"

    def lab_clip(self, run: Run) -> Tensor | None:
        return torch.zeros((), device=run.device) if self.active(run) else None


@fault(
    "clip.before_unscale",
    title="The loss is scaled, and gradients are clipped before they are divided again",
    cause="clip.before_unscale",
    moves="clip.left",
    repair=BEFORE_UNSCALE.repair,
)
class BeforeUnscale(Fault):
    """Multiplies the loss by 2^power before the backward pass, and divides the gradients after they are clipped."""

    at: str = "clipping"
    power: Annotated[int, Interval(ge=1, le=24)] = 16

    def lab_backward(self, run: Run, step: Step) -> bool | None:
        if not self.active(run):
            return None
        assert step.loss is not None
        (step.loss * 2.0**self.power).backward()  # type: ignore[no-untyped-call]
        return True

    def lab_clip(self, run: Run) -> Generator[None, Tensor, Tensor]:
        norm = yield
        if self.active(run):
            for p in run.parameters.values():
                if p.grad is not None:
                    p.grad.mul_(2.0**-self.power)
        return norm

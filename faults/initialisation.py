"""Weights that start wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

TOO_LARGE = Cause(
    id="init.too_large",
    title="Weights start too large",
    must=("start.loss_high",),
    may=("start.scale_high",),
    locate=("start.scale_high",),
    place="head",
    module=True,
    repair="Initialise with standard deviation gain / sqrt(fan_in); the head, and a table tied to it, smaller still "
    "(0.02 in GPT-2). nn.Embedding starts with 1, which is too large for a tied head.",
    refute="At step 0 the standard deviation of the logits is at most sqrt(2).",
    look="The standard deviation of each matrix at step 0 against sqrt(2 / fan_in).",
    source="He et al., 2015, section 2.2; Glorot and Bengio, 2010",
)


@fault(
    "init.too_large",
    title="Matrices start with a standard deviation far too large",
    cause="init.too_large",
    moves="start.loss",
    repair=TOO_LARGE.repair,
)
class TooLarge(Fault):
    """Scales the matrices of the modules named to standard deviation `std`."""

    at: str = "head"
    std: Annotated[float, Gt(0)] = 1.0

    def lab_build_model(self) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        model = yield
        matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and self.holds(name)]
        if not matrices:
            raise BadInput(f"init.too_large: no matrix at {self.at!r}")
        with torch.no_grad():
            for p in matrices:
                p.mul_(self.std / p.std())
        return model

"""Values that are not numbers."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from lab import Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

NONFINITE = Cause(
    id="numerics.nonfinite",
    title="A value becomes NaN or infinite",
    must=("value.nonfinite",),
    may=("*",),  # whatever comes after it is made of it
    cannot=("integrity.weight_bit", "integrity.state_bit"),  # then it is made of that
    repair="Guard the operation that makes it: a logarithm or a square root of 0, a division by 0, an exponential or a "
    "float16 that overflows. Until then, skip the update when the gradient norm is not finite.",
    refute="The inputs of the site named are not finite either: then look further upstream.",
    look="The operation that makes this tensor, on the batch of that step.",
    source="Micikevicius et al., 2018 (overflow in float16)",
)

NONFINITE_GRADIENT = Cause(
    id="numerics.nonfinite_gradient",
    title="A gradient becomes NaN or infinite while all values are finite",
    must=("gradient.nonfinite",),
    may=("*",),
    cannot=("integrity.weight_bit", "integrity.state_bit"),
    repair="Look for an operation whose derivative is infinite where its value is not: sqrt at 0, norm of a zero "
    "vector, log of an underflowed softmax, where() over a branch that is not taken.",
    refute="A value in the forward pass of the same step is not finite.",
    look="torch.autograd.set_detect_anomaly(True), for that one step.",
    source="pytorch/pytorch#68425",
)


@fault(
    "numerics.nonfinite",
    title="One element of a tensor becomes NaN or infinite",
    cause="numerics.nonfinite",
    moves="activation.rms",
    repair=NONFINITE.repair,
)
class NonFinite(Fault):
    """Writes NaN or infinity into the first element of the value, or of the gradient, at a site."""

    at: str = field()  # no default: it has to be said where
    value: Literal["nan", "inf", "-inf"] = "nan"
    gradient: bool = False
    every: Annotated[int, Ge(1)] = 1

    def lab_start(self, run: Run) -> None:
        self.run = run
        self.replace(run, self.at, self.change, grad=self.gradient)

    def change(self, value: Tensor) -> Tensor:
        if (self.run.step.index - self.from_step) % self.every:
            return value
        first = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
        first[0] = True
        return value.masked_fill(first.view(value.shape), float(self.value))


@fault(
    "numerics.overflow_float16",
    title="A tensor passes through float16 at a scale at which it overflows",
    cause="numerics.nonfinite",
    moves="activation.rms",
    repair="Compute it in bfloat16 or float32, or divide before the product, not after it: float16 ends at 65504.",
)
class OverflowFloat16(Fault):
    """Rounds the value at a site, `scale` times as large, to float16: what is above 65504 / scale becomes infinite."""

    at: str = field()  # no default: it has to be said where
    scale: Annotated[float, Gt(0)] = 1.0

    def lab_start(self, run: Run) -> None:
        self.replace(run, self.at, lambda value: (value * self.scale).half().to(value.dtype) / self.scale)

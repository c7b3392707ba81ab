"""Backward passes that end too early, or round what they carry to nothing, and the causes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from lab import Run

DETACHED = Cause(
    id="loop.detached",
    title="The graph is cut: nothing before a place in the model gets a gradient",
    must=("backward.cut",),
    repair="Pass the tensor itself on. These cut it off: .detach(), .data, .item(), .numpy(), torch.tensor(x). To "
    "freeze a part on purpose set requires_grad=False for its parameters, and leave them out of the optimiser.",
    refute="p.grad is not None for a parameter before the place named.",
    look="What happens to the output of the module named, before the next one is given it; or where the parameter "
    "named is used.",
    source="PyTorch documentation: Tensor.detach; autograd mechanics, excluding subgraphs",
)

GRADIENT_UNDERFLOW = Cause(
    id="precision.gradient_underflow",
    title="Small gradients become 0 on their way back: float16 without loss scaling",
    must=("backward.lost",),
    may=("flow.zero", "arrival.*", "movement.none"),
    module=True,
    repair="Multiply the loss by a large factor before backward() and divide the gradients by it before they are used "
    "(torch.amp.GradScaler: scale, unscale_, step, update); or take bfloat16, whose range is that of float32.",
    refute="Gradients have no more exact zeros with the loss as it is than with one 4096 times as large.",
    look="The dtype in which the backward pass runs at the module named, and whether the loss is scaled.",
    source="Micikevicius et al., 2018, section 3.2 (loss scaling)",
)


@fault(
    "loop.detached",
    title="The output of a module is detached",
    cause="loop.detached",
    moves="arrival.share",
    repair=DETACHED.repair,
)
class Detached(Fault):
    """Passes the value at a module's output on without its history."""

    at: str = "blocks.0"

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        inside = [name for name in run.parameters if self.holds(name)]
        if not inside or len(inside) == len(run.parameters) or self.at == "head":
            raise BadInput(f"loop.detached: at = {self.at!r} is not a part of this model before its last layer")
        self.replace(run, f"{self.at}.out", lambda value: value.detach())


@fault(
    "precision.gradient_underflow",
    title="A gradient passes through float16 without loss scaling",
    cause="precision.gradient_underflow",
    moves="backward.lost",
    repair=GRADIENT_UNDERFLOW.repair,
)
class GradientUnderflow(Fault):
    """Rounds the gradient at a module's output to float16, `smaller` times as small as it is.

    Gradients of a large model are far below 1e-7; those of a small one are not, unless they are made so.
    """

    at: str = "blocks.0"
    smaller: Annotated[float, Gt(0)] = 1e6

    def lab_start(self, run: Run) -> None:
        self.replace(
            run, f"{self.at}.out", lambda grad: (grad / self.smaller).half().to(grad.dtype) * self.smaller, grad=True
        )

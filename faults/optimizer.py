"""Optimisers that do not hold what they should train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch.optim import Optimizer

    from lab import Run

MISSING = Cause(
    id="optimizer.missing_parameter",
    title="A parameter is missing from the optimiser",
    must=("movement.unheld",),
    repair="Build the groups from model.parameters() and check that their sizes add up. A module kept in a plain list, "
    "or added after the optimiser was built, is easily left out; to freeze on purpose, set requires_grad=False.",
    refute="The parameter is in optimizer.param_groups, and moves.",
    look="How the parameter groups are built, above all how names are filtered.",
    source="PyTorch documentation: torch.optim, constructing it",
)


@fault(
    "optimizer.missing_parameter",
    title="The optimiser is not given a parameter",
    cause="optimizer.missing_parameter",
    moves="movement.distance",
    repair=MISSING.repair,
)
class MissingParameter(Fault):
    """Takes the parameters named out of the optimiser's groups; puts them back when the run ends."""

    at: str = "blocks.0.mlp.up"

    def lab_build_optimizer(self, run: Run) -> Generator[None, Optimizer, Optimizer]:
        self.from_the_start()
        optimizer = yield
        left_out = {id(p) for name, p in run.model.named_parameters() if self.holds(name)}
        if not left_out:
            raise BadInput(f"optimizer.missing_parameter: no parameter at {self.at!r}")
        for group in optimizer.param_groups:
            run.cleanup.callback(group.__setitem__, "params", group["params"])
            group["params"] = [p for p in group["params"] if id(p) not in left_out]
        return optimizer

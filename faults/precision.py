"""Numbers kept in fewer bits than what is done with them needs, and the causes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from lab import Run

UPDATE_LOST = Cause(
    id="precision.update_lost",
    title="Weights are kept in bfloat16, and most updates are too small to change them",
    must=("precision.update_lost",),
    may=("movement.none",),
    place="optimizer",
    repair="Keep a float32 copy of the weights for the optimiser, and compute in bfloat16 (autocast); or add updates "
    "with a compensation (Kahan) or with stochastic rounding.",
    refute="Weights whose update is below a quarter of a unit in the last place change now and then.",
    look="The dtype that the model was cast to before the optimiser was built, and the learning rate.",
    source="Micikevicius et al., 2018, section 3.1; Zamirai et al., 2020 (Revisiting BFloat16 Training)",
)


@fault(
    "precision.update_lost",
    title="Weights are kept in bfloat16",
    cause="precision.update_lost",
    moves="precision.lost",
    repair=UPDATE_LOST.repair,
)
class UpdateLost(Fault):
    """Rounds every weight to bfloat16, to the nearest, when the run begins and after each update."""

    def lab_start(self, run: Run) -> None:
        if not self.from_step:
            self.rounded(run)

    def lab_update(self, run: Run) -> Generator[None, bool, bool]:
        done = yield
        if self.active(run):
            self.rounded(run)
        return done

    def rounded(self, run: Run) -> None:
        with torch.no_grad():
            for p in run.parameters.values():
                p.copy_(p.bfloat16())

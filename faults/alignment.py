"""References that do not stay what the policy was at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from lab import Run

ALIASED = Cause(
    id="alignment.reference_aliased",
    title="The reference is the policy itself",
    must=("reference.shared",),
    place="reference",
    repair="Copy the model before training, copy.deepcopy(model).eval().requires_grad_(False), or load it a second "
    "time. A second name is no copy.",
    refute="No trained parameter of the policy has the memory of one of the reference.",
    look="The line that makes the reference. A margin of exactly 0 in every step, and a loss of ln 2, go with it.",
    source="Rafailov et al., 2023, equation 7",
)

TRAINED = Cause(
    id="alignment.reference_trained",
    title="The weights of the reference change",
    must=("reference.moved",),
    place="reference",
    repair="Freeze the reference, and keep it out of the optimiser and of whatever synchronises or averages weights.",
    refute="Each weight of the reference is what it was at the start.",
    look="What writes into the reference: an optimiser built over both models, a moving average, a synchronisation.",
    source="Rafailov et al., 2023, section 4; Gorbatovski et al., 2024 (a reference that is moved on purpose)",
)


def learner(run: Run, fault: Fault) -> Any:
    """Return what holds the reference of a run.

    Raises:
        BadInput: There is no reference.
    """
    for _, plugin in run.plugins.list_name_plugin():
        if isinstance(getattr(plugin, "reference", None), torch.nn.Module):
            return plugin
    raise BadInput(f"{fault.info.id}: needs a reference model (train.objective = 'dpo')")


@fault(
    "alignment.reference_aliased",
    title="The policy is compared with itself",
    cause="alignment.reference_aliased",
    moves="reference.shared",
    repair=ALIASED.repair,
)
class ReferenceAliased(Fault):
    """Puts the policy in the place of the reference; puts the reference back when the run ends."""

    at: str = "reference"

    def lab_start(self, run: Run) -> None:
        holder = self.holder = learner(run, self)
        run.cleanup.callback(setattr, holder, "reference", holder.reference)

    def lab_zero_grad(self, run: Run) -> None:
        if self.active(run):
            self.holder.reference = run.model


@fault(
    "alignment.reference_trained",
    title="The reference follows the policy",
    cause="alignment.reference_trained",
    moves="reference.moved",
    repair=TRAINED.repair,
)
class ReferenceTrained(Fault):
    """Moves each weight of the reference by `share` of the way to the policy's after every update."""

    at: str = "reference"
    share: Annotated[float, Interval(gt=0, le=1)] = 0.1

    def lab_start(self, run: Run) -> None:
        self.holder = learner(run, self)

    def lab_update(self, run: Run) -> Generator[None, bool, bool]:
        done = yield
        if self.active(run):
            policy = dict(run.model.named_parameters())
            with torch.no_grad():
                for name, weight in self.holder.reference.named_parameters():
                    weight.lerp_(policy[name], self.share)
        return done

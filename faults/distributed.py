"""Processes that do not train one model, and the cause behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from lab import Run

NO_SYNC = Cause(
    id="distributed.no_sync",
    title="Gradients are not averaged over the processes",
    must=("ranks.gradients",),
    may=("ranks.drift",),
    place="distributed",
    repair="Call the DistributedDataParallel wrapper, not the module inside it, and leave the last backward pass of "
    "each step out of no_sync(): only there are gradients averaged.",
    refute="Just before each update every process holds the same gradients, bit for bit.",
    look="Which module is called, and what wraps the last backward pass of a step.",
    source="Li et al., 2020; PyTorch documentation: DistributedDataParallel, no_sync",
)

DRIFT = Cause(
    id="distributed.drift",
    title="The processes train models of their own",
    must=("ranks.drift",),
    cannot=("ranks.gradients",),
    place="distributed",
    repair="Change weights in the optimiser's step alone, or in the same way in every process; broadcast what one of "
    "them loads or draws.",
    refute="After each update every process holds the same weights, bit for bit.",
    look="What one process does and the others do not: if rank == 0, and random numbers that are drawn apart.",
    source="Li et al., 2020, section 3.1",
)


@fault(
    "distributed.no_sync",
    title="Gradients are not averaged over the processes",
    cause="distributed.no_sync",
    moves="ranks.gradients",
    repair=NO_SYNC.repair,
)
class NoSync(Fault):
    """Each process keeps its own gradients; nothing is sent."""

    def lab_start(self, run: Run) -> None:
        found = [plugin.parallel for _, plugin in run.plugins.list_name_plugin() if hasattr(plugin, "parallel")]
        if not found:
            raise BadInput('distributed.no_sync: needs train.ranks above 1 and train.parallel = "data"')
        self._parallel: Any = found[0]

    def lab_zero_grad(self, run: Run) -> None:
        """Nothing is cleared here; from this step on, nothing is sent."""
        parallel = self._parallel
        if self.active(run) and parallel.syncing:
            run.cleanup.callback(setattr, parallel, "syncing", True)
            run.cleanup.callback(parallel.__dict__.pop, "finish", None)
            parallel.syncing, parallel.finish = False, lambda: None


@fault(
    "distributed.drift",
    title="Only the first process updates its weights",
    cause="distributed.drift",
    moves="ranks.drifted",
    repair=DRIFT.repair,
)
class Drift(Fault):
    """Puts the old weights back after each update, in every process but the first."""

    at: str = "distributed"

    def lab_start(self, run: Run) -> None:
        if not any(hasattr(plugin, "parallel") for _, plugin in run.plugins.list_name_plugin()):
            raise BadInput('distributed.drift: needs train.ranks above 1 and train.parallel = "data"')

    def lab_update(self, run: Run) -> Generator[None, bool, bool]:
        others = self.active(run) and torch.distributed.get_rank() > 0
        held = [(p, p.detach().clone()) for p in run.parameters.values()] if others else []
        done = yield
        with torch.no_grad():
            for p, before in held:
                p.copy_(before)
        return done

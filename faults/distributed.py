"""Processes that do not train one model, and the cause behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from lab import Run

DRIFT = Cause(
    id="distributed.drift",
    title="The processes train models of their own",
    must=("ranks.drift",),
    repair="Call the DistributedDataParallel wrapper, not the module inside it, and leave the last backward pass of "
    "each step out of no_sync(): only there are gradients averaged.",
    refute="After each update every process holds the same weights, bit for bit.",
    look="Compare one gradient between two processes just before the update.",
    source="Li et al., 2020; PyTorch documentation: DistributedDataParallel, no_sync",
)


@fault(
    "distributed.no_sync",
    title="Gradients are not averaged over the processes",
    cause="distributed.drift",
    moves="ranks.drifted",
    repair=DRIFT.repair,
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

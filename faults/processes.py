"""Processes whose gradients are averaged wrongly: sums for means, too early, of too few, of different models."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from lab import Run, Step

PARTIAL_SYNC = Cause(
    id="distributed.partial_sync",
    title="The gradient of one weight is not averaged over the processes",
    must=("reduction.left_out",),
    may=("ranks.gradients", "ranks.drift"),
    place="distributed",
    repair="Wrap the model in DistributedDataParallel after its last parameter was added and made trainable; take the "
    "weight out of _ddp_params_and_buffers_to_ignore.",
    refute="Just before each update every process holds the same gradient of this weight.",
    look="What is added, replaced or unfrozen after the model was wrapped, and lists of what is left out.",
    source="PyTorch documentation: DistributedDataParallel, 'never try to change your model's parameters after'",
)

SUM_FOR_MEAN = Cause(
    id="distributed.sum_for_mean",
    title="Gradients are added up over the processes, not averaged",
    must=("reduction.summed",),
    place="distributed",
    repair="Divide by the number of processes: ReduceOp.AVG, or all_reduce and then grad /= world, before gradients "
    "are clipped. A loss that is a sum over tokens is divided by their number in all processes instead.",
    refute="The gradient is the mean of the processes' own, each of the mean loss over its rows.",
    look="What follows all_reduce, and what the loss was divided by before it.",
    source="Li et al., 2020, section 3.1 (gradients are averaged); PyTorch documentation: DistributedDataParallel",
)

AVERAGED_TWICE = Cause(
    id="distributed.averaged_twice",
    title="Gradients are divided twice by the number of processes",
    must=("reduction.divided",),
    place="distributed",
    repair="Leave the division to one of them: DistributedDataParallel averages already, so neither the loss nor the "
    "gradient is divided by the number of processes again.",
    refute="The gradient is the mean of the processes' own, each of the mean loss over its rows.",
    look="Every place that divides by the number of processes.",
    source="PyTorch documentation: DistributedDataParallel (gradients are averaged across processes)",
)

SYNC_TOO_EARLY = Cause(
    id="distributed.sync_too_early",
    title="Gradients are averaged after the first part of a batch, and not after the last",
    must=("reduction.early",),
    may=("ranks.gradients", "ranks.drift"),
    place="loop",
    repair="Wrap all backward passes of a step but the last in no_sync(), the forward pass too; with "
    "accelerator.accumulate(model) that is done. What follows the average stays in one process.",
    refute="The gradient is the mean over the processes of all parts of a batch.",
    look="The condition under which no_sync() is entered: the last part, (i + 1) % parts == 0, must stay out of it.",
    source="PyTorch documentation: DistributedDataParallel.no_sync; Hugging Face Accelerate: gradient synchronization",
)

INITIALISED_APART = Cause(
    id="distributed.initialised_apart",
    title="The processes begin with different weights",
    must=("ranks.apart",),
    place="distributed",
    repair="Broadcast weights and buffers from one process before the first step: DistributedDataParallel does it when "
    "it wraps the model. What is loaded or drawn afterwards is loaded and drawn alike in all of them.",
    refute="Before the first update every process holds the same weights, bit for bit.",
    look="What changes weights after they were broadcast: initialisation, checkpoints, if rank == 0.",
    source="Li et al., 2020, section 3.1 (all replicas start from the same state)",
)


def replicas(run: Run, fault: Fault) -> Any:
    """Return what averages the gradients.

    Raises:
        BadInput: Nothing does.
    """
    found = [plugin.parallel for _, plugin in run.plugins.list_name_plugin() if hasattr(plugin, "parallel")]
    if not found:
        raise BadInput(f'{fault.info.id}: needs train.ranks above 1 and train.parallel = "data"')
    return found[0]


def after_finish(run: Run, fault: Fault, then: Callable[[list[Tensor | None]], None]) -> None:
    """Call ``then(own)`` whenever gradients were averaged, with what each was before; until the run ends."""
    parallel = replicas(run, fault)
    finish = parallel.finish

    def finished() -> None:
        own = [None if p.grad is None else p.grad.clone() for p in run.parameters.values()]
        finish()
        if fault.active(run):
            then(own)

    run.cleanup.callback(parallel.__dict__.pop, "finish", None)
    parallel.finish = finished


@fault(
    "distributed.partial_sync",
    title="A weight is left out when gradients are averaged",
    cause="distributed.partial_sync",
    moves="reduction.left_out",
    repair=PARTIAL_SYNC.repair,
)
class PartialSync(Fault):
    """Puts back, after the average, this process's own gradient of the weights that `at` names."""

    at: str = dataclasses.field()

    def lab_start(self, run: Run) -> None:
        chosen = [self.holds(name) for name in run.parameters]
        if not any(chosen):
            raise BadInput(f"distributed.partial_sync: at = {self.at!r}: no weight has this name")

        def put_back(own: list[Tensor | None]) -> None:
            for p, before, out in zip(run.parameters.values(), own, chosen, strict=True):
                if out and before is not None:
                    p.grad = before

        after_finish(run, self, put_back)


def multiply(run: Run, factor: float) -> None:
    """Multiply every gradient."""
    for p in run.parameters.values():
        if p.grad is not None:
            p.grad.mul_(factor)


@fault(
    "distributed.sum_for_mean",
    title="Gradients are added up over the processes",
    cause="distributed.sum_for_mean",
    moves="reduction.ratio",
    repair=SUM_FOR_MEAN.repair,
)
class SumForMean(Fault):
    """Leaves the division by the number of processes out."""

    at: str = "distributed"

    def lab_start(self, run: Run) -> None:
        after_finish(run, self, lambda _own: multiply(run, torch.distributed.get_world_size()))


@fault(
    "distributed.averaged_twice",
    title="Gradients are divided twice by the number of processes",
    cause="distributed.averaged_twice",
    moves="reduction.ratio",
    repair=AVERAGED_TWICE.repair,
)
class AveragedTwice(Fault):
    """Divides the averages by the number of processes once more."""

    at: str = "distributed"

    def lab_start(self, run: Run) -> None:
        after_finish(run, self, lambda _own: multiply(run, 1 / torch.distributed.get_world_size()))


@fault(
    "distributed.sync_too_early",
    title="Gradients are averaged after the first part of a batch only",
    cause="distributed.sync_too_early",
    moves="ranks.gradients",
    repair=SYNC_TOO_EARLY.repair,
)
class SyncTooEarly(Fault):
    """Averages the gradients of a step's first part; those of the others each process adds up for itself."""

    at: str = "loop"

    def lab_start(self, run: Run) -> None:
        self._parallel: Any = replicas(run, self)
        if run.config.train.accumulate < 2:
            raise BadInput("distributed.sync_too_early: needs train.accumulate above 1")

    def lab_backward(self, run: Run, step: Step) -> Generator[None, bool, bool]:
        parallel = self._parallel
        if not self.active(run):
            return (yield)
        before = parallel.syncing
        parallel.syncing = step.part == 0
        try:
            done = yield
        finally:
            parallel.syncing = before
        if step.part == 0:
            parallel.__dict__.pop("finish", None)
            parallel.finish()
            run.cleanup.callback(parallel.__dict__.pop, "finish", None)
            parallel.finish = lambda: None  # when the last part has passed nothing is sent any more
        return done


@fault(
    "distributed.initialised_apart",
    title="Each process begins with weights of its own",
    cause="distributed.initialised_apart",
    moves="ranks.apart",
    repair=INITIALISED_APART.repair,
)
class InitialisedApart(Fault):
    """Gives the numbers of each matrix other signs in every process but the first, after they were broadcast."""

    at: str = "distributed"

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        replicas(run, self)
        if run.config.train.shard_optimizer:
            raise BadInput("distributed.initialised_apart: a sharded optimiser sends all weights at its first update")
        rank = torch.distributed.get_rank()
        draw = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for p in run.parameters.values() if rank else []:
                if p.dim() >= 2:
                    p.mul_((2 * torch.randint(2, p.shape, generator=draw) - 1).to(p))

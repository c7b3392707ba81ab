"""Processes that are given the wrong rows: all the same ones, or shares that overlap; and the causes behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from lab import BadInput, Cause, Fault, fault

from .processes import replicas

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Batch, Run, Step

SAME_SHARD = Cause(
    id="distributed.same_shard",
    title="Every process reads the same rows",
    must=("shards.same*",),
    place="data",
    repair="Give the DataLoader a DistributedSampler(dataset, num_replicas=world, rank=rank), or split_dataset_by_node "
    "in datasets; an IterableDataset has to skip the others' rows itself. Call sampler.set_epoch(epoch).",
    refute="The batches of two processes hold different rows.",
    look="Where the loader learns the rank: a sampler that was left out, or made before the process group.",
    source="PyTorch documentation: DistributedSampler; Hugging Face documentation: split_dataset_by_node",
)

SHARD_OFF_BY_ONE = Cause(
    id="distributed.shard_off_by_one",
    title="The shares of two processes overlap",
    must=("shards.overlap",),
    cannot=("shards.same*",),
    place="data",
    repair="Let share r of n end where share r + 1 begins: rows[r * n : (r + 1) * n], or rows[rank::world]; "
    "DistributedSampler and Tensor.chunk do it. Where rows overlap, others are in no share.",
    refute="The shares of all processes together are the batch, each row once.",
    look="Where a share begins and ends, and whether the end belongs to it.",
    source="PyTorch documentation: DistributedSampler; torch.Tensor.chunk",
)


@fault(
    "distributed.same_shard",
    title="Every process is given the rows of the first",
    cause="distributed.same_shard",
    moves="shards.shared",
    repair=SAME_SHARD.repair,
)
class SameShard(Fault):
    """Gives each process the rows of rank 0, in training and in evaluation."""

    at: str = "data"

    def lab_start(self, run: Run) -> None:
        replicas(run, self)

    def lab_zero_grad(self, run: Run) -> None:
        """Nothing is cleared here; from this step on, rows are those of rank 0."""
        rows = run.data
        if self.active(run) and rows.rank:
            run.cleanup.callback(setattr, rows, "rank", rows.rank)
            rows.rank = 0


@fault(
    "distributed.shard_off_by_one",
    title="Each process begins a row before the one before it ends",
    cause="distributed.shard_off_by_one",
    moves="shards.shared",
    repair=SHARD_OFF_BY_ONE.repair,
)
class ShardOffByOne(Fault):
    """Lets each process begin `rows` rows before the share of the one before it ends; the last rows go to nobody."""

    at: str = "data"
    rows: Annotated[int, Ge(1)] = 1

    def lab_start(self, run: Run) -> None:
        replicas(run, self)
        share = len(run.data.batch(0, "train").args[0])
        if share <= self.rows:
            raise BadInput(f"distributed.shard_off_by_one: rows = {self.rows}, and {share} rows for each process")

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train":
            return batch
        whole, share = run.data.source.batch(step.index, "train"), len(batch.args[0])
        begin = run.data.rank * (share - self.rows)

        def part(value: Tensor) -> Tensor:
            return value[begin : begin + share].to(run.device)

        targets = None if whole.targets is None else part(whole.targets)
        return replace(batch, args=tuple(map(part, whole.args)), targets=targets)

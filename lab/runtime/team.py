"""Several processes that train one model: what each shares out, and what they do together.

A team is a plugin of the core: it is asked before the objective and the engine, and wraps what they answer.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from lab.errors import BadInput
from lab.projects.distributed.component import DataParallel, ShardedAdamW, mean_over_ranks
from lab.projects.parallel.component import ParallelFeedForward
from lab.runtime.tasks import Rows

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lab.context import Run, Step
    from lab.runtime.data import Source
    from lab.scenario import Scenario


class Team:
    """One process of several.

    Attributes:
        rank, world: Which one, of how many.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def agree(self, wish: bool) -> bool:
        """Whether any of the processes wishes it."""
        wishes = torch.tensor(float(wish))
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        return bool(wishes)

    def lab_evaluate(self) -> Generator[None, Tensor, Tensor]:
        """The mean loss over all processes."""
        loss = yield
        return mean_over_ranks(loss)


class Replicas(Team):
    """Each process has the whole model and its own rows of each batch; gradients are averaged."""

    parallel: DataParallel

    def lab_build_data(self) -> Generator[None, Source, Source]:
        """This process's rows."""
        source = yield
        return Rows(source, self.rank, self.world)

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        """The same weights everywhere, and gradients averaged as the backward pass makes them."""
        model = (yield).to(run.device)
        self.parallel = DataParallel(model)
        return model

    def lab_build_optimizer(self) -> Generator[None, Optimizer, Optimizer]:
        """The engine's, or one that keeps this process's share of the state."""
        whole = yield
        if not self.scenario.train.shard_optimizer:
            return whole
        return ShardedAdamW(whole.param_groups, lr=whole.defaults["lr"])

    def lab_backward(self, step: Step) -> Generator[None, bool, bool]:
        """Average after the last part of a batch only."""
        if step.part < step.parts - 1:
            with self.parallel.no_sync():
                return (yield)
        return (yield)

    def lab_clip(self) -> Generator[None, Tensor, Tensor]:
        """Wait for the averages before their norm is taken."""
        self.parallel.finish()
        return (yield)


class Shards(Team):
    """Each process has all of each batch and its share of the feed-forward layers' weights (Shoeybi et al., 2019)."""

    def lab_build_model(self) -> Generator[None, nn.Module, nn.Module]:
        """Cut each feed-forward layer into shares.

        Raises:
            BadInput: The layers are not of the kind that can be cut here.
        """
        model = yield
        if self.scenario.model.activation != "gelu" or self.scenario.train.objective in ("masked", "seq2seq"):
            raise BadInput("train.parallel = 'tensor' cuts the layers of a decoder with model.activation = 'gelu'")
        self.shards: set[int] = set()
        for block in model.get_submodule("blocks").children():
            whole: Any = block.mlp
            cut = ParallelFeedForward(
                whole.up.weight, whole.up.bias, whole.down.weight, whole.down.bias, rank=self.rank, world=self.world
            )
            block.mlp = cut
            self.shards |= {id(p) for name, p in cut.named_parameters() if not name.endswith("down.bias")}
        return model

    @torch.no_grad()
    def lab_clip(self, run: Run) -> Tensor:
        """Clip by the norm over all shares: each share of a cut weight counts, and what all have counts once."""
        grads = [(id(p) in self.shards, p.grad) for p in run.parameters.values() if p.grad is not None]
        squares = torch.zeros(2, device=run.device)
        for cut, grad in grads:
            squares[int(cut)] += grad.square().sum()
        shared, cut_ = squares[0], squares[1:].clone()
        dist.all_reduce(cut_)
        norm = (shared + cut_[0]).sqrt()
        factor = (self.scenario.train.clip / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(factor)
        return norm


TEAMS: MappingProxyType[str, type[Team]] = MappingProxyType({"data": Replicas, "tensor": Shards})

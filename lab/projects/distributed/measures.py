"""Numbers of distributed training that theory knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import backward
from torch.nn import functional as F

from lab.projects.backprop.component import AdamW
from lab.projects.decoder.component import Decoder
from lab.projects.distributed.component import (
    DataParallel,
    ShardedAdamW,
    checksum,
    in_buckets,
    ring_all_reduce,
    ring_bytes,
    shard,
)
from lab.ranks import together
from lab.spec import measure, normal

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WORLD, BATCH, V, LENGTH, BUCKET = 2, 8, 32, 16, 8192


def _on(world: int, work: Callable[[int], T]) -> list[T]:
    AdamW([torch.zeros(1)])  # the first optimiser imports much of torch: once here, and not on each rank
    return together(world, work)


def _model(seed: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(V, context=LENGTH, layers=2, width=16, heads=2)


def _loss(model: Decoder, seed: int, rows: list[int]) -> Tensor:
    text = torch.randint(V, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))[rows]
    return F.cross_entropy(model(text[:, :-1]).reshape(-1, V), text[:, 1:].reshape(-1))


def _rows(seed: int, rank: int, epoch: int = 0) -> list[int]:
    return shard(BATCH, rank, WORLD, epoch=epoch, seed=seed)


def _trained(seed: int, rank: int, steps: int) -> Decoder:
    model = _model(seed + rank)  # as different as can be; rank 0's must win
    parallel, optimiser = DataParallel(model, bucket_bytes=BUCKET), ShardedAdamW(model.parameters())
    for step in range(steps):
        optimiser.zero_grad()
        backward(_loss(model, seed, _rows(seed, rank, step)))
        parallel.finish()
        optimiser.step()
    return model


@measure(
    "largest distance of gradients of 2 ranks from those of one process on both shares, in float32; 0 but for rounding"
)
def gradient_gap(seed: int) -> float:
    def work(rank: int) -> list[Tensor]:
        model = _model(seed)
        parallel = DataParallel(model, bucket_bytes=BUCKET)
        backward(_loss(model, seed, _rows(seed, rank)))
        parallel.finish()
        return [p.grad for p in model.parameters() if p.grad is not None]

    whole = _model(seed)
    backward(_loss(whole, seed, list(range(BATCH))))
    expected = [p.grad for p in whole.parameters() if p.grad is not None]
    return max(float((a - b).abs().max()) for found in _on(WORLD, work) for a, b in zip(found, expected, strict=True))


@measure("ranks whose parameters have another checksum than rank 0's after 3 steps; 0")
def checksum_gap(seed: int) -> float:
    sums = _on(WORLD, lambda rank: int(checksum(_trained(seed, rank, 3).parameters())))
    return float(sum(each != sums[0] for each in sums))


@measure("bytes that a rank sends to sum 1200 numbers over 3 ranks by the ring, over 2 (N - 1) / N M; 1")
def ring_bytes_over_closed_form(seed: int) -> float:
    world, size = 3, 1200

    def work(rank: int) -> int:
        with patch.object(dist, "isend", wraps=dist.isend) as sent:
            ring_all_reduce(normal(seed + rank, size))
        return sum(call.args[0].nbytes for call in sent.call_args_list)

    return max(_on(world, work)) / ring_bytes(world, size * torch.float64.itemsize)


@measure("largest distance of the ring's sum from that of all_reduce over 3 ranks, in float64; 0 but for rounding")
def ring_gap(seed: int) -> float:
    def work(rank: int) -> float:
        x = normal(seed + rank, 1000)
        ours = ring_all_reduce(x)
        dist.all_reduce(x)
        return float((ours - x).abs().max())

    return max(_on(3, work))


@measure("bytes of the optimiser's state on the rank that holds most, over AdamW's; about 1/2 with 2 ranks")
def optimiser_state_share(seed: int) -> float:
    def held(optimiser: torch.optim.Optimizer) -> int:
        return sum(v.nbytes for state in optimiser.state.values() for v in state.values() if isinstance(v, Tensor))

    def work(rank: int) -> float:
        model = _model(seed)
        sharded, whole = ShardedAdamW(model.parameters()), AdamW(model.parameters())
        backward(_loss(model, seed, _rows(seed, rank)))
        sharded.step()
        whole.step()
        return held(sharded) / held(whole)

    return max(_on(WORLD, work))


@measure("largest distance of ShardedAdamW's parameters from AdamW's after 3 steps on 2 ranks; 0")
def sharded_adamw_gap(seed: int) -> float:
    def work(_: int) -> float:
        models = [_model(seed), _model(seed)]
        optimisers = [ShardedAdamW(models[0].parameters(), lr=0.01), AdamW(models[1].parameters(), lr=0.01)]
        for _step in range(3):
            for model, optimiser in zip(models, optimisers, strict=True):
                optimiser.zero_grad()
                backward(_loss(model, seed, list(range(BATCH))))
                optimiser.step()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    return max(_on(WORLD, work))


@measure("examples of 1000 that two of 4 ranks see in one epoch; 0")
def shards_overlap(seed: int) -> float:
    shares = [set(shard(1000, rank, 4, epoch=0, seed=seed)) for rank in range(4)]
    return float(sum(map(len, shares)) - len(set.union(*shares)))


def _messages(seed: int, rank: int) -> tuple[int, int, int]:
    """All-reduces that had begun when backward ended, all of them, and buckets."""
    model = _model(seed)
    parallel = DataParallel(model, bucket_bytes=BUCKET)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
        backward(_loss(model, seed, _rows(seed, rank)))
        during = sent.call_count
        parallel.finish()
    return during, sent.call_count, len(in_buckets(reversed(list(model.parameters())), BUCKET))


@measure("all-reduces of one step over buckets; 1")
def all_reduces_over_buckets(seed: int) -> float:
    return max(total / buckets for _, total, buckets in _on(WORLD, lambda rank: _messages(seed, rank)))


@measure("share of the buckets that are on their way when backward ends; 1 where every parameter is used")
def sent_during_backward(seed: int) -> float:
    return min(during / total for during, total, _ in _on(WORLD, lambda rank: _messages(seed, rank)))

"""Project 20: data parallel, an optimiser whose state is sharded, and the ring, on torch.distributed's collectives.

Valiant, 1990 (bulk-synchronous steps); Li et al., 2020 (buckets that overlap with backward); Rajbhandari et al., 2020
(ZeRO: sharded state); Patarasuk and Yuan, 2009 (the ring). A collective is called by every rank, in the same order, or
all of them wait for ever. With one process, or without a process group, everything here is a no-op on its own numbers.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lab.errors import BadInput
from lab.projects.backprop.component import AdamW

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from lab.projects.backprop.component import Params


def ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def in_buckets(params: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """Cut a list, in order, into buckets of one dtype and device that hold at most `limit` bytes.

    No tensor is cut: one that is larger has a bucket of its own. A limit below 1 raises `BadInput`.
    """
    if limit < 1:
        raise BadInput(f"a bucket of {limit} bytes; it takes at least 1")
    buckets: list[list[Tensor]] = []
    newest: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}  # and the bytes left in it
    for param in params:
        kind = param.dtype, param.device
        bucket, room = newest.get(kind, ([], 0))
        if param.nbytes > room or not bucket:
            bucket, room = [], limit
            buckets.append(bucket)
        bucket.append(param)
        newest[kind] = bucket, room - param.nbytes
    return buckets


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], source: int) -> None:
    """Overwrite tensors with the values that rank `source` holds: one message for each dtype, not for each tensor."""
    rank, world = ranks()
    for group in in_buckets(tensors, sys.maxsize) if world > 1 else []:
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, source)
        if rank != source:
            for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                tensor.copy_(part.view(tensor.shape))


class Bucket:
    """Parameters whose gradients travel in one message. Its flat buffer is made once and serves every step."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.waiting = params, set(params)  # waiting: without a gradient in this step, as yet
        sizes = [p.numel() for p in params]
        # One number more for each parameter: whether it has a gradient on any rank.
        self.flat = torch.zeros(sum(sizes) + len(params), dtype=params[0].dtype, device=params[0].device)
        *parts, self.present = torch.split(self.flat, [*sizes, len(params)])
        self.parts = [part.view(p.shape) for p, part in zip(params, parts, strict=True)]
        self.work: dist.Work | None = None

    @torch.no_grad()
    def send(self) -> None:
        """Start to average the gradients over the ranks. A parameter without one contributes zeros."""
        self.flat.zero_()
        for p, part in zip(self.params, self.parts, strict=True):
            if p.grad is not None:
                part.copy_(p.grad)
        self.present.copy_(torch.tensor([p.grad is not None for p in self.params]))
        self.flat.div_(ranks()[1])  # before the sum: that of float16 overflows at 65504
        self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for the averages and write them to the gradients. One that is None on every rank stays None."""
        if self.work is not None:
            self.work.wait()
        for i, (p, part) in enumerate(zip(self.params, self.parts, strict=True)):
            if p.grad is not None:
                p.grad.copy_(part)
            elif self.present[i] > 0:
                p.grad = part.clone()  # the buffer is used again
        self.work, self.waiting = None, set(self.params)


class DataParallel:
    """Each rank runs the model on examples of its own; gradients are averaged while backward still runs.

    Parameters and buffers begin as those of rank 0, and stay equal because gradients are. After ``backward()`` call
    ``finish()``: it leaves the mean over the ranks, which is the gradient of the whole batch if shares have equal size.

    Args:
        model: The same on every rank. A parameter that is used in two places counts once.
        bucket_bytes: Gradients travel in buckets of this size, the last parameters first, as backward meets them. Small
            buckets leave sooner; each costs a message. Below 1 raises `BadInput`.
    """

    def __init__(self, model: nn.Module, *, bucket_bytes: int = 1 << 20) -> None:
        self.syncing, self.sent = True, 0  # whether backward communicates; buckets on their way in this step
        lists = in_buckets(reversed([p for p in model.parameters() if p.requires_grad]), bucket_bytes)
        broadcast([*model.parameters(), *model.buffers()], 0)
        self.buckets = [Bucket(params) for params in lists] if ranks()[1] > 1 else []
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.params}
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.bucket_of]  # type: ignore[no-untyped-call]

    def _arrived(self, param: Tensor) -> None:
        """Note a gradient that is complete, and send the buckets that are."""
        if not self.syncing:
            return
        waiting = self.bucket_of[param].waiting
        if param not in waiting:
            raise BadInput("a second backward before finish(); run all but the last one in no_sync()")
        waiting.remove(param)
        # A full bucket waits for those before it: ranks must send in one order, whichever gradient came first.
        while self.sent < len(self.buckets) and not self.buckets[self.sent].waiting:
            self.buckets[self.sent].send()
            self.sent += 1

    def finish(self) -> None:
        """Send what is not yet sent, wait, and leave in each gradient its mean over the ranks. Each rank must call it.

        A parameter without a gradient on some ranks counts there as zeros; one without on every rank keeps None.
        """
        for bucket in self.buckets[self.sent :]:
            bucket.send()
        for bucket in self.buckets:
            bucket.receive()
        self.sent = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """In here backward only adds to the gradients. The backward after it sends the sums."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    def detach(self) -> None:
        """Remove the hooks: backward no longer sends anything."""
        for hook in self.hooks:
            hook.remove()


class ShardedAdamW(AdamW):
    """AdamW whose two means are held once in all, not once on each rank (ZeRO, stage 1).

    Each rank owns a share of the parameters, whole tensors, balanced by size. It keeps their state, updates them, and
    sends the new values to the others. Gradients must be alike on all ranks, as `DataParallel` leaves them. Arguments
    are those of `AdamW`. Each rank saves its own ``state_dict()``, and loads it as the same rank of as many.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.rank, self.world = ranks()
        self.owner: dict[Tensor, int] = {}  # the rank that updates each parameter
        self.load = [0] * self.world  # how many numbers each rank owns
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and share its parameters out: the largest first, each to the rank that owns least."""
        super().add_param_group(param_group)
        for p in sorted(self.param_groups[-1]["params"], key=Tensor.numel, reverse=True):
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update this rank's share of a group, and exchange the new values."""
        mine = [i for i, p in enumerate(params) if self.owner[p] == self.rank]
        if mine:
            super().update(group, [params[i] for i in mine], [grads[i] for i in mine])
        for rank in range(self.world):
            broadcast([p for p in params if self.owner[p] == rank], rank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this rank returned. The state of another rank's share raises `BadInput`."""
        params = [p for group in self.param_groups for p in group["params"]]
        foreign = [i for i in state_dict["state"] if i < len(params) and self.owner[params[i]] != self.rank]
        if foreign:
            raise BadInput(f"this is not the state of rank {self.rank} of {self.world}; each rank loads its own")
        super().load_state_dict(state_dict)


def shard(count: int, rank: int, world: int, *, epoch: int, seed: int) -> list[int]:
    """Return the examples that a rank sees in an epoch: every world-th of a shuffle that all ranks know.

    Ranks get equally many, ``ceil(count / world)``. Where `world` does not divide `count`, the shuffle goes on from its
    start, so that a few examples are seen twice and none is left out. A rank that is not one of 0 to world - 1 raises
    `BadInput`, and so does a negative number.
    """
    if not 0 <= rank < world or min(count, epoch, seed) < 0:
        raise BadInput(f"rank {rank} of {world}, {count} examples, epoch {epoch}, seed {seed}: none may be below 0")
    order = np.random.default_rng([seed, epoch]).permutation(count)
    places = np.arange(rank, -(-count // world) * world, world)
    return [int(i) for i in order[places % max(1, count)]]


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a hash [] (int64) of all bits: of every number, the dtypes, the shapes and the order.

    0 and -0 differ. A sum in floating point would miss a small change, and any change of the order.
    """
    tensors = list(tensors)
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    value = int.from_bytes(digest.digest(), "little", signed=True)
    return torch.tensor(value, device=tensors[0].device if tensors else None)


def rank_that_differs(tensors: Iterable[Tensor]) -> int | None:
    """Return the first rank that does not hold the bits that most ranks do, or None; of as many of each, rank 0's."""
    own, world = checksum(tensors), ranks()[1]
    found = [torch.zeros_like(own) for _ in range(world)]
    if world > 1:
        dist.all_gather(found, own)
    sums = [int(each) for each in found]
    usual = Counter(sums).most_common(1)[0][0]
    return next((rank for rank, each in enumerate(sums) if each != usual), None)


def ranks_agree(tensors: Iterable[Tensor]) -> bool:
    """Whether all ranks hold the same bits. 8 bytes a rank are sent, whatever the size."""
    return rank_that_differs(tensors) is None


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean over the ranks, of floating point, in a new tensor of the same shape."""
    mean = x.detach() / ranks()[1]
    if ranks()[1] > 1:
        dist.all_reduce(mean)
    return mean


@torch.no_grad()
def ring_all_reduce(x: Tensor) -> Tensor:
    """Return the sum over the ranks in a new tensor. Each rank only speaks to its two neighbours.

    The tensor is cut into as many chunks as there are ranks. First each chunk travels the ring and gathers its sum
    (reduce-scatter); then each sum travels it once more (all-gather). All ranks get the same bits. `x` has the same
    shape and dtype on every rank, and any number of entries.
    """
    rank, world = ranks()
    flat = x.detach().reshape(-1).clone()
    chunks = torch.tensor_split(flat, world)  # the first are longer by one where world does not divide the size
    for step in range(world - 1):
        taken = chunks[(rank - step - 1) % world]
        taken.add_(_passed_on(chunks[(rank - step) % world], torch.empty_like(taken)))
    for step in range(world - 1):
        _passed_on(chunks[(rank - step + 1) % world], chunks[(rank - step) % world])
    return flat.view(x.shape)


def _passed_on(sent: Tensor, received: Tensor) -> Tensor:
    """Send a chunk to the next rank, and fill and return the one that comes from the rank before."""
    rank, world = ranks()
    # Not a send that waits: if each rank waited for the next to receive, none would come to receive.
    sending = dist.isend(sent, (rank + 1) % world) if sent.numel() else None
    if received.numel():
        dist.recv(received, (rank - 1) % world)
    if sending is not None:
        sending.wait()
    return received


def ring_bytes(world: int, size: int) -> float:
    """Return how many of `size` bytes each rank sends in a ring: ``2 (N - 1) / N size``. N < 1 raises `BadInput`."""
    if world < 1:
        raise BadInput(f"a ring of {world} ranks; it takes at least 1")
    return 2 * (world - 1) / world * size

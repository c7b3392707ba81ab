"""Project 19: computing in parts: tiles, ranks, recomputation, loss scaling, batches ahead, and what bounds the time.

Milakov and Gimelshein, 2018, and Dao et al., 2022 (tiled attention); Shoeybi et al., 2019 (tensor parallel layers);
Chen et al., 2016 (recomputation); Micikevicius et al., 2018 (loss scaling); Amdahl, 1967; Williams et al., 2009
(roofline). A sum over the ranks is called by every rank, in the same order, or all of them wait for ever.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.activations.component import gelu
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

T = TypeVar("T")


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *, tile: int = 64, causal: bool = True) -> Tensor:
    """Attention that holds no more scores than those of one tile of keys, forward or backward.

    Args:
        q: [B H T D].
        k: [B H S D].
        v: [B H S D].
        tile: How many keys all queries meet at once.
        causal: Whether the queries are the last T of S positions, and see none that is later than their own.

    Returns:
        [B H T D], in the dtype of q. The statistics are float32 at least. A query that may see nothing gives 0.

    Raises:
        BadInput: The tile is below 1, or the shapes do not fit each other.
    """
    if tile < 1:
        raise BadInput(f"a tile of {tile} keys; it takes at least 1")
    alike = q.dim() == 4 and k.shape == v.shape and (*q.shape[:2], k.shape[-2], q.shape[-1]) == k.shape
    if not alike:
        shapes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
        raise BadInput(f"{shapes}: expected [B H T D] and twice [B H S D]")
    out: Tensor = _Tiled.apply(q, k, v, tile, causal)  # type: ignore[no-untyped-call]
    return out


class _Tiled(torch.autograd.Function):
    """A running softmax over the tiles. Backward computes the weights of each again: none is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tile: int, causal: bool) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        scaled = q.to(exact) * q.shape[-1] ** -0.5  # [B H T D]
        top = torch.full_like(scaled[..., :1], -math.inf)  # [B H T 1], the largest score so far
        total, mixed = torch.zeros_like(top), torch.zeros_like(scaled)  # the sums below it, of weights and of values
        for first, keys in _tiles(q.shape[-2], k.shape[-2], tile, causal=causal):
            scores = _scores(scaled, k, first, keys, causal=causal)  # [B H t s]
            higher = torch.maximum(top[..., first:, :], scores.amax(dim=-1, keepdim=True))  # [B H t 1]
            shrink = (top[..., first:, :] - higher).exp()  # of what was summed below the old maximum
            weights = scores.sub_(higher).exp_()  # [B H t s]
            total[..., first:, :].mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
            mixed[..., first:, :].mul_(shrink).add_(weights @ v[..., keys, :].to(exact))
            top[..., first:, :] = higher
        out = (mixed / total.clamp_min(torch.finfo(exact).tiny)).to(q.dtype)  # [B H T D]
        ctx.save_for_backward(q, k, v, out, top + total.log())  # the last is logsumexp of the scores, [B H T 1]
        ctx.tile, ctx.causal = tile, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        exact, scale = log_sum.dtype, q.shape[-1] ** -0.5
        scaled, grad = q.to(exact) * scale, grads[0].to(exact)  # [B H T D]
        along = (grad * out).sum(dim=-1, keepdim=True)  # [B H T 1], the same for all tiles: sum_s p_s dp_s
        dq, dk, dv = torch.zeros_like(scaled), torch.empty_like(k), torch.empty_like(v)
        for first, keys in _tiles(q.shape[-2], k.shape[-2], ctx.tile, causal=ctx.causal):
            scores, seen = _scores(scaled, k, first, keys, causal=ctx.causal), grad[..., first:, :]
            weights = scores.sub_(log_sum[..., first:, :]).exp_()  # [B H t s], normalised
            inward = (seen @ v[..., keys, :].to(exact).mT).sub_(along[..., first:, :]).mul_(weights)  # [B H t s]
            dq[..., first:, :] += inward @ k[..., keys, :].to(exact)
            dk[..., keys, :] = inward.mT @ scaled[..., first:, :]
            dv[..., keys, :] = weights.mT @ seen
        return (dq * scale).to(q.dtype), dk, dv, None, None


def _tiles(t: int, s: int, tile: int, *, causal: bool) -> Iterator[tuple[int, slice]]:
    """The tiles of keys, each with the first query that sees any of it. Those before it are skipped."""
    for start in range(0, s, tile):
        yield max(0, start + t - s) if causal else 0, slice(start, min(start + tile, s))


def _scores(scaled: Tensor, k: Tensor, first: int, keys: slice, *, causal: bool) -> Tensor:  # -> [B H t s]
    """The scores of the queries from `first` on with a tile of keys; -inf where the mask hides one."""
    scores = scaled[..., first:, :] @ k[..., keys, :].to(scaled.dtype).mT  # [B H t s]
    if causal:
        ahead = first + k.shape[-2] - scaled.shape[-2] - keys.start  # query i of these sees key j if j <= i + ahead
        edge = scores[..., : scores.shape[-1], :]  # the queries after these see all of the tile
        hidden = torch.ones(edge.shape[-2:], dtype=torch.bool, device=k.device).triu(ahead + 1)
        edge.masked_fill_(hidden, -math.inf)
    return scores


def copy_to_ranks(x: Tensor) -> Tensor:
    """Give every rank the same tensor: the identity forward, a sum over the ranks backward. Alone, a no-op."""
    return x if _alone() else _CopyToRanks.apply(x)  # type: ignore[no-untyped-call]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add up what the ranks have: a sum over the ranks forward, the identity backward. Alone, a no-op."""
    return x if _alone() else _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # all_reduce overwrites its argument
    dist.all_reduce(total)
    return total


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _share(size: int, rank: int, world: int) -> slice:
    """The part of an axis that belongs to a rank."""
    if not 0 <= rank < world or size % world:
        raise BadInput(f"rank {rank} of {world} cannot have a share of {size}; shares are equal, ranks count from 0")
    return slice(rank * size // world, (rank + 1) * size // world)


class ColumnParallelLinear(Component):
    """The rows of a weight that belong to one rank: from all inputs it computes its share of the outputs.

    The weight's transpose, as in ``x W^T``, is cut by columns; hence the name.

    Args:
        weight: Of the dense layer, [out in].
        bias: Of the dense layer, [out], or None.
        rank, world: Which share, of how many.

    Raises:
        BadInput: There is no such rank, or `out` is no multiple of `world`.
    """

    SITES = MappingProxyType({"out": "B T F"})

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int, world: int) -> None:
        super().__init__()
        mine = _share(weight.shape[0], rank, world)
        self.world = world
        self.weight = nn.Parameter(weight.detach()[mine].clone())  # [out/world in]
        self.bias = None if bias is None else nn.Parameter(bias.detach()[mine].clone())  # [out/world]

    def forward(self, x: Tensor) -> Tensor:  # [... in] -> [... out/world]
        """This rank's outputs. The gradient of x is the sum of those of all ranks."""
        x = copy_to_ranks(x) if self.world > 1 else x
        return self.tap("out", F.linear(x, self.weight, self.bias))


class RowParallelLinear(Component):
    """The columns of a weight that belong to one rank: from its share of the inputs it computes a term of each output.

    Args:
        weight: Of the dense layer, [out in].
        bias: Of the dense layer, [out], or None. Every rank keeps it whole.
        rank, world: Which share, of how many.

    Raises:
        BadInput: There is no such rank, or `in` is no multiple of `world`.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int, world: int) -> None:
        super().__init__()
        mine = _share(weight.shape[1], rank, world)
        self.world = world
        self.fan_in = weight.shape[1]  # an output sums all inputs, over the ranks
        self.weight = nn.Parameter(weight.detach()[:, mine].clone())  # [out in/world]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # [out]

    def forward(self, x: Tensor) -> Tensor:  # [... in/world] -> [... out]
        """The sum of the terms of all ranks, plus the bias, once."""
        y = F.linear(x, self.weight)
        y = sum_over_ranks(y) if self.world > 1 else y
        return self.tap("out", y if self.bias is None else y + self.bias)


class ParallelFeedForward(Component):
    """Column, GELU, row: one sum over the ranks forward and one backward (Shoeybi et al., 2019, figure 3a).

    Args:
        up_weight, up_bias, down_weight, down_bias: Of the dense layers: [F C], [F], [C F], [C].
        rank, world: Which share, of how many.

    Raises:
        BadInput: There is no such rank, or the hidden width F is no multiple of `world`.
    """

    SITES = MappingProxyType({"hidden": "B T F", "out": "B T C"})

    def __init__(
        self,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        *,
        rank: int,
        world: int,
    ) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(up_weight, up_bias, rank=rank, world=world)
        self.down = RowParallelLinear(down_weight, down_bias, rank=rank, world=world)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """Each rank computes its share of the hidden layer, which no other needs: GELU acts on entries."""
        hidden = self.tap("hidden", gelu(self.up(x)))  # [B T F/world]
        return self.tap("out", self.down(hidden))  # [B T C]


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function, keep only its inputs, and call it again in the backward pass.

    The second call draws the same random numbers on the CPU, and runs under the same autocast. Parameters used inside
    receive their gradients in ``.grad``: this is for ``backward()``, and not for ``torch.autograd.grad`` of parameters.

    Args:
        function: Of the inputs. It must compute the same when it is called again: what it changes, it changes twice.
        inputs: Tensors; those that need no gradient get none.
    """
    # A result has a graph only if an argument has one; the parameters inside may be all there is to learn.
    anchor = torch.empty(0, requires_grad=True)
    output: Tensor = _Recompute.apply(function, anchor, *inputs)  # type: ignore[no-untyped-call]
    return output


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], _anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.random = function, torch.get_rng_state()
        ctx.cast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(*inputs)
        return function(*inputs)  # no graph: autograd is off inside a Function

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", *ctx.cast):
            torch.set_rng_state(ctx.random)
            output = ctx.function(*inputs)
        if output.requires_grad:
            torch.autograd.backward(output, grads[0])
        return (None, None, *(x.grad for x in inputs))


class LossScaler:
    """A factor on the loss that lifts small gradients into the range of float16, as large as no gradient overflows.

    Parameters should be float32: gradients are unscaled where they are, and in float16 they would vanish again.

    Args:
        scale: The first factor.
        growth: What it is multiplied by after `every` steps in a row without an overflow.
        backoff: What it is multiplied by after an overflow.
        every: See `growth`.

    Raises:
        BadInput: Unless scale > 0, growth >= 1, 0 < backoff < 1 and every >= 1.
    """

    def __init__(self, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, every: int = 2000) -> None:
        if not (0 < scale < math.inf and 1 <= growth < math.inf and 0 < backoff < 1 and every >= 1):
            raise BadInput(f"a scale of {scale}, growth {growth}, backoff {backoff}, every {every}: out of range")
        self.scale, self.growth, self.backoff, self.every = scale, growth, backoff, every
        self.good = 0  # steps in a row without an overflow

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiply: call ``backward()`` on what is returned."""
        return loss * self.scale

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Unscale the gradients, let the optimiser step unless one is not finite, and choose the next factor.

        Clip and log gradients after this factor is divided out, not before.

        Returns:
            Whether the optimiser stepped.
        """
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            grad.div_(self.scale)
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        if finite:
            optimizer.step()
        self._update(finite=finite)
        return finite

    def _update(self, *, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale *= self.backoff
        elif self.good == self.every:
            self.scale, self.good = self.scale * self.growth, 0


def amdahl(share: float, speedup: float) -> float:
    """Return how many times as fast the whole is when this share of its time becomes `speedup` times as fast.

    Raises:
        BadInput: The share is not in [0, 1], or the speed-up is not above 0.
    """
    if not (0 <= share <= 1 and speedup > 0):
        raise BadInput(f"a share of {share} of the time, {speedup} times as fast; expected 0 to 1, and above 0")
    left = (1 - share) + share / speedup
    return 1 / left if left else math.inf


def intensity(flops: float, bytes: float) -> float:  # noqa: A002 - what the roofline model calls it
    """Return the FLOPs for each byte that is moved; infinite where none is."""
    return flops / bytes if bytes else math.inf


def roofline(flops: float, bytes: float, *, peak_flops: float, peak_bytes: float) -> float:  # noqa: A002
    """Return the seconds that work takes at least: of computing and moving, the slower one.

    Raises:
        BadInput: An amount is below 0, or a peak (per second) is not above 0.
    """
    if not (flops >= 0 and bytes >= 0 and peak_flops > 0 and peak_bytes > 0):
        raise BadInput(f"{flops} FLOPs at {peak_flops} a second, {bytes} bytes at {peak_bytes} a second")
    return max(flops / peak_flops, bytes / peak_bytes)


def batches_ahead(make: Callable[[int], T], count: int, *, workers: int = 1, ahead: int = 2) -> Iterator[T]:
    """Yield ``make(0)`` to ``make(count - 1)`` in order, while threads make those that come next.

    Of those that are begun, never more than ``workers + ahead`` are not yet taken. What `make` raises is raised at its
    place. When the taker stops, batches that are begun are finished, no other is begun, and the threads end.

    Args:
        make: Called with the index of a batch, by several threads at once if there are several workers.
        count: How many batches there are.
        workers: How many threads.
        ahead: How many batches may lie ready beside those that are being made.

    Raises:
        BadInput: A number is below 0, or there is no worker.
    """
    if workers < 1 or min(count, ahead) < 0:
        raise BadInput(f"{count} batches by {workers} workers, {ahead} ahead: expected at least 0, 1 and 0")
    return _in_order(make, count, workers, workers + ahead)


def _in_order(make: Callable[[int], T], count: int, workers: int, most: int) -> Iterator[T]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[Future[T]] = deque()
    begun = 0
    try:
        for _ in range(count):
            while begun < count and len(waiting) < most:
                waiting.append(pool.submit(make, begun))
                begun += 1
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

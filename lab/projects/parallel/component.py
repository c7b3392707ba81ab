"""Project 19: computing in parts: tiles, ranks, recomputation, fewer bits, and work done ahead.

Milakov and Gimelshein, 2018, and Dao et al., 2022 (tiled attention); Shoeybi et al., 2019 (tensor parallel layers);
Chen et al., 2016 (recomputation); Micikevicius et al., 2018 (loss scaling); Amdahl, 1967; Williams et al., 2009
(roofline).
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lab.errors import BadInput
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

T = TypeVar("T")


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *, tile: int = 64, causal: bool = True) -> Tensor:
    """Attention that never holds more than a tile of the scores: a running softmax (Dao et al., 2022, algorithm 1).

    For each tile of queries it passes over the tiles of keys, and keeps the largest score so far, the sum of
    exponentials below it, and the weighted sum of values. When a larger score appears, both sums are scaled down.

    Args:
        q: [B H T D].
        k: [B H S D].
        v: [B H S D].
        tile: How many queries, and how many keys, meet at once.
        causal: Whether query t sees the keys s <= t + S - T only. Tiles that are hidden as a whole are skipped.

    Returns:
        [B H T D], in the dtype of q; the sums are kept at least in float32. A query that sees nothing gives 0.

    Raises:
        BadInput: The tile is below 1.
    """
    if tile < 1:
        raise BadInput(f"a tile of {tile} queries; it must be at least 1")
    ahead = k.shape[-2] - q.shape[-2]  # how many keys stand before the first query's own
    starts = range(0, q.shape[-2], tile)
    return torch.cat([_attend(q[..., i : i + tile, :], k, v, i + ahead if causal else None, tile) for i in starts], -2)


def _attend(q: Tensor, k: Tensor, v: Tensor, place: int | None, tile: int) -> Tensor:  # -> [B H t D]
    """One tile of queries, the first of which stands at `place` among the keys; None sees all."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q_scaled = q.to(exact) * q.shape[-1] ** -0.5
    top = q_scaled.new_full((*q.shape[:-1], 1), torch.finfo(exact).min)  # [B H t 1]
    total, mixed = torch.zeros_like(top), q_scaled.new_zeros(*q.shape[:-1], v.shape[-1])
    last = k.shape[-2] if place is None else min(k.shape[-2], place + q.shape[-2])
    for j in range(0, last, tile):
        scores = q_scaled @ k[..., j : j + tile, :].to(exact).mT  # [B H t s]
        if place is not None and j + tile > place:
            rows = torch.arange(place, place + q.shape[-2], device=q.device)[:, None]  # [t 1]
            hidden = torch.arange(j, j + scores.shape[-1], device=q.device) > rows  # [t s]
            scores = scores.masked_fill(hidden, -math.inf)
        higher = torch.maximum(top, scores.detach().amax(dim=-1, keepdim=True))  # no gradient: it cancels
        shrink, weights = (top - higher).exp(), (scores - higher).exp()  # [B H t 1], [B H t s]
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        mixed = mixed * shrink + weights @ v[..., j : j + tile, :].to(exact)
        top = higher
    attended: Tensor = mixed / total.clamp_min(torch.finfo(exact).tiny)
    return attended.to(q.dtype)


class _Copy(torch.autograd.Function):
    """The identity forward, a sum over the ranks backward."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return _sum(grads[0])


class _Sum(torch.autograd.Function):
    """A sum over the ranks forward, the identity backward."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def copy_to_ranks(x: Tensor) -> Tensor:
    """Hand the same tensor to every rank: its gradient is the sum of theirs. With one rank nothing happens."""
    return x if _alone() else _Copy.apply(x)  # type: ignore[no-untyped-call]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add what the ranks have: each gets the gradient of the sum. With one rank nothing happens."""
    return x if _alone() else _Sum.apply(x)  # type: ignore[no-untyped-call]


def share(size: int, rank: int, world: int) -> slice:
    """Return the part of an axis that a rank has.

    Raises:
        BadInput: The axis is no multiple of the number of ranks.
    """
    if size % world:
        raise BadInput(f"a width of {size} is no multiple of {world} ranks")
    return slice(rank * size // world, (rank + 1) * size // world)


class ColumnParallelLinear(Component):
    """The rows of a weight [out in] that belong to a rank: it computes its share of the outputs from all inputs.

    Args:
        weight, bias: Of the whole layer, [out in] and [out].
        rank, world: Which share, of how many.
    """

    SITES = MappingProxyType({"out": "B T F"})

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int, world: int) -> None:
        super().__init__()
        mine = share(weight.shape[0], rank, world)
        self.weight = nn.Parameter(weight.detach()[mine].clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach()[mine].clone())

    def forward(self, x: Tensor) -> Tensor:  # [B T in] -> [B T out/world]
        """This rank's outputs; the gradient of the input is summed over the ranks."""
        return self.tap("out", F.linear(copy_to_ranks(x), self.weight, self.bias))


class RowParallelLinear(Component):
    """The columns of a weight [out in] that belong to a rank: it computes a term of all outputs from its inputs.

    Args:
        weight, bias: Of the whole layer, [out in] and [out]. Every rank keeps the whole bias.
        rank, world: Which share, of how many.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int, world: int) -> None:
        super().__init__()
        mine = share(weight.shape[1], rank, world)
        self.weight = nn.Parameter(weight.detach()[:, mine].clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:  # [B T in/world] -> [B T out]
        """The sum of all ranks' terms, and the bias once."""
        y = sum_over_ranks(F.linear(x, self.weight))
        return self.tap("out", y if self.bias is None else y + self.bias)


class ParallelFeedForward(Component):
    """Column-parallel, GELU, row-parallel: one sum over the ranks forward and one backward (Shoeybi et al., figure 3).

    Args:
        up_weight, up_bias, down_weight, down_bias: Of the whole layer: [F C], [F], [C F], [C].
        rank, world: Which share, of how many.

    Raises:
        BadInput: The hidden width F is no multiple of `world`.
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
        """Each rank computes its share of the hidden layer."""
        hidden = self.tap("hidden", F.gelu(self.up(x)))  # [B T F/world]
        return self.tap("out", self.down(hidden))


class _Recompute(torch.autograd.Function):
    """Keeps the inputs instead of what is between them and the output."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], _anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)  # the same dropout as the first time
            output = ctx.function(*inputs)
        torch.autograd.backward(output, grads[0])
        return (None, None, *(x.grad for x in inputs))


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function and keep only its inputs; the backward pass calls it again, with the same random numbers.

    Costs one more forward pass and saves what the function would have kept. Parameters used inside get gradients.
    """
    # An output has a graph only if an input has one; the parameters inside the function may be all there is.
    anchor = torch.ones((), requires_grad=True)
    output: Tensor = _Recompute.apply(function, anchor, *inputs)  # type: ignore[no-untyped-call]
    return output


class LossScaler:
    """Multiplies the loss so that small gradients do not vanish in float16, and finds a factor that fits.

    Args:
        scale: The first factor.
        growth: By what it grows after `every` good steps in a row.
        backoff: By what it shrinks when a gradient is not finite; that step is left out.
        every: See `growth`.
    """

    def __init__(self, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, every: int = 2000) -> None:
        self.scale, self.growth, self.backoff, self.every = scale, growth, backoff, every
        self.good = 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the factor: call backward on this."""
        return loss * self.scale

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the factor and let the optimiser step, unless one is not finite; choose the next.

        Returns:
            Whether the optimiser stepped.
        """
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = all(bool(torch.isfinite(grad).all()) for grad in grads)
        if not finite:
            self.scale *= self.backoff
            self.good = 0
            return False
        for grad in grads:
            grad.div_(self.scale)
        optimizer.step()
        self.good += 1
        if self.good == self.every:
            self.scale *= self.growth
            self.good = 0
        return True


def amdahl(share_of_time: float, speedup: float) -> float:
    """How much faster the whole gets when this share of its time gets `speedup` times as fast (Amdahl, 1967)."""
    return 1 / ((1 - share_of_time) + share_of_time / speedup)


def intensity(flops: float, size: float) -> float:
    """FLOPs per byte moved."""
    return flops / size


def roofline(flops: float, size: float, *, peak_flops: float, peak_bytes: float) -> float:
    """The least seconds for work of `flops` that moves `size` bytes, on a machine of these peaks per second."""
    return max(flops / peak_flops, size / peak_bytes)


def batches_ahead(make: Callable[[int], T], count: int, *, workers: int = 1, ahead: int = 2) -> Iterator[T]:
    """Yield ``make(0)`` to ``make(count - 1)`` in order, while threads prepare those that come next.

    Never more than `ahead` are waiting or being made beyond the one that was taken. An error of `make` is raised in
    its place; when the taker stops early, what is begun is finished and nothing more is begun.

    Args:
        make: Makes one batch from its index. Called by several threads at once if `workers` is above 1.
        count: How many.
        workers: Threads.
        ahead: How many may be prepared before they are asked for, at least 1.

    Raises:
        BadInput: `workers` or `ahead` is below 1.
    """
    if workers < 1 or ahead < 1:
        raise BadInput(f"{workers} workers and {ahead} batches ahead; both must be at least 1")
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
        try:
            for index in range(count):
                waiting.append(pool.submit(make, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

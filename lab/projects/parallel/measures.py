"""Numbers of computing in parts that theory knows."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import backward, grad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lab.projects.attention.component import Attention
from lab.projects.parallel.component import (
    LossScaler,
    ParallelFeedForward,
    amdahl,
    batches_ahead,
    recompute,
    roofline,
    tiled_attention,
)
from lab.ranks import together
from lab.spec import measure, normal

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 32  # C
PAUSE = 0.005  # seconds that a batch, or a step, takes where only waiting is timed


def _qkv(seed: int, length: int, width: int) -> list[Tensor]:
    return [normal(seed * 3 + i, 1, 2, length, width, dtype=torch.float32) for i in range(3)]


@measure("largest gap of tiled attention in float32 to softmax in float64, T = 512; rounding, a few 1e-7")
def tiled_gap(seed: int) -> float:
    q, k, v = _qkv(seed, 512, 32)
    exact = Attention().explicit(q.double(), k.double(), v.double())
    return float((tiled_attention(q, k, v).double() - exact).abs().max())


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many numbers the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


@measure("largest tensor of tiled attention, forward or backward, over that of full, T = 1024; 64 / 1024 = 1/16")
def tiled_largest(seed: int) -> float:
    leaves = [x[:, :1].requires_grad_() for x in _qkv(seed, 1024, 64)]
    largest: list[int] = []
    for attend in (tiled_attention, Attention().explicit):
        with _Largest() as seen:
            backward(attend(*leaves).sum())
        largest.append(seen.largest)
    return largest[0] / largest[1]


@measure("products that a causal mask leaves of those of 16 tiles, forward and backward; (16 + 1) / 32 = 0.531")
def causal_tiles(seed: int) -> float:
    leaves, flops = [x.requires_grad_() for x in _qkv(seed, 256, 8)], []
    for causal in (True, False):
        with FlopCounterMode(display=False) as counter:
            backward(tiled_attention(*leaves, tile=16, causal=causal).sum())
        flops.append(counter.get_total_flops())
    return float(flops[0] / flops[1])


def _weights(seed: int) -> list[Tensor]:
    shapes = ((256, 64), (256,), (64, 256), (64,))
    return [normal(seed * 5 + i, *shape, dtype=torch.float32, scale=0.1) for i, shape in enumerate(shapes)]


@measure("largest gap of a feed-forward layer over 2 processes to the dense one, output and input gradient; rounding")
def tensor_parallel_gap(seed: int) -> float:
    weights, x = _weights(seed), normal(seed * 5 + 4, 8, 64, dtype=torch.float32).requires_grad_()
    up, up_bias, down, down_bias = weights
    dense = F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
    (dense_grad,) = grad(dense.sum(), x)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        out: Tensor = ParallelFeedForward(*weights, rank=rank, world=2)(x)
        return out.detach(), grad(out.sum(), x)[0]

    expected = torch.cat([dense.detach(), dense_grad])
    return max(float((torch.cat(found) - expected).abs().max()) for found in together(2, work))


def _sums(seed: int) -> tuple[int, int]:
    """How many sums over the ranks rank 0 takes part in, forward and backward."""

    def work(rank: int) -> tuple[int, int]:
        layer = ParallelFeedForward(*_weights(seed), rank=rank, world=2)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            out = layer(torch.ones(2, 64, requires_grad=True))
            forward = sent.call_count
            backward(out.sum())
        return forward, sent.call_count - forward

    return together(2, work)[0]


@measure("sums over the ranks in a forward pass of the cut feed-forward layer; 1")
def all_reduces(seed: int) -> float:
    return _sums(seed)[0]


@measure("sums over the ranks in its backward pass; 1")
def all_reduces_backward(seed: int) -> float:
    return _sums(seed)[1]


@measure("weights of the layer that one process of two keeps, over all; (1 - 1/F') / 2 + 1/F', F' = 517: 0.501")
def tensor_parallel_share(seed: int) -> float:
    weights = _weights(seed)
    mine = ParallelFeedForward(*weights, rank=0, world=2)
    return sum(p.numel() for p in mine.parameters()) / sum(w.numel() for w in weights)


def _blocks(seed: int) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(4)
        ]


@measure("largest gap of output and gradients that are recomputed to those that are kept, dropout included; 0")
def recompute_gap(seed: int) -> float:
    block, found = nn.Sequential(_blocks(seed)[0], nn.Dropout(0.3)), []
    for call in (block, lambda x: recompute(block, x)):
        block.zero_grad()
        x = normal(seed, 16, WIDTH, dtype=torch.float32).requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = call(x)
            backward(out.square().sum())
        grads = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
        found.append(torch.cat([part.detach().flatten() for part in (out, *grads)]))
    return float((found[0] - found[1]).abs().max())


@measure("numbers kept for backward with recomputation over without; a row's C of 10 C + 2, C = 32: 0.0994")
def recompute_share(seed: int) -> float:
    blocks, kept = _blocks(seed), []
    for again in (True, False):
        sizes: dict[int, int] = {}

        def note(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if not isinstance(x, nn.Parameter) and x._base is None:
                sizes[x.data_ptr()] = x.numel()
            return x

        x = normal(seed, 64, WIDTH, dtype=torch.float32).requires_grad_()
        with saved_tensors_hooks(note, lambda x: x):
            for block in blocks:
                x = x + (recompute(block, x) if again else block(x))
        kept.append(sum(sizes.values()))
    return kept[0] / kept[1]


def _lost(seed: int, scale: float) -> float:
    """The share of gradients, normal with deviation 2^-25, that are 0 after their way through float16."""
    p = torch.zeros(100_000, requires_grad=True)
    weights = normal(seed, 100_000, dtype=torch.float32, scale=2.0**-25)
    loss = LossScaler(scale=scale).scale_loss((p.half().float() * weights).sum())
    return float((grad(loss, p)[0] == 0).float().mean())


@measure("share of gradients of deviation 2^-25 that vanish in float16, which ends there; P(|z| <= 1) = 0.683")
def lost_without_scaling(seed: int) -> float:
    return _lost(seed, 1.0)


@measure("the same with the loss times 2^16; P(|z| <= 2^-16) = 1.2e-5")
def lost_with_scaling(seed: int) -> float:
    return _lost(seed, 2.0**16)


@measure("share of steps left out where 2^16 fits and 2^17 does not, growth tried every 20 steps; 1/21 = 0.0476")
def steps_left_out(_seed: int) -> float:
    p = torch.zeros(1, requires_grad=True)
    scaler, optimizer, left_out = LossScaler(every=20), torch.optim.SGD([p], lr=0.0), 0
    for _ in range(420):
        optimizer.zero_grad()
        backward(scaler.scale_loss((p.half().float() * 0.75).sum()))  # 0.75 x 2^17 is above 65504
        left_out += not scaler.step(optimizer)
    return left_out / 420


@measure("gain when 95% of the time gets infinitely fast; 1 / (1 - 0.95) = 20")
def amdahl_limit(_seed: int) -> float:
    return amdahl(0.95, math.inf)


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


@measure("gain of 4 workers on 12 waits, beside 4 in turn, over Amdahl's for a share of 0.75, 2.29; 1, a little less")
def amdahl_measured(_seed: int) -> float:
    def run(workers: int) -> None:
        for _ in range(4):
            time.sleep(2 * PAUSE)
        for _ in batches_ahead(lambda _: time.sleep(2 * PAUSE), 12, workers=workers, ahead=4):
            pass

    one, four = (min(_seconds(lambda n=n: run(n)) for _ in range(3)) for n in (1, 4))  # type: ignore[misc]
    return one / four / amdahl(0.75, 4.0)


@measure("time of 20 batches and steps of one length, batches made ahead, over both in turn; 21 / 40 = 0.525")
def time_with_batches_ahead(_seed: int) -> float:
    def run(batches: Callable[[Callable[[int], None], int], Any]) -> None:
        for _ in batches(lambda _: time.sleep(PAUSE), 20):
            time.sleep(PAUSE)

    return _seconds(lambda: run(batches_ahead)) / _seconds(lambda: run(lambda make, count: map(make, range(count))))


def _over_roofline() -> tuple[float, float]:
    """Seconds of a product and of an addition over their bounds, on one core.

    The best of several runs each, since other work on the machine only adds time. The peaks are the best rates seen, in
    these very runs and in those of a larger product and a copy, so that no result is below 1.
    """
    n, large, long = 512, 768, 2_000_000
    a, b, c, d = torch.ones(n, n), torch.ones(n, n), torch.ones(large, large), torch.ones(large, large)
    x, y, z = (torch.ones(long) for _ in range(3))
    work: list[tuple[Callable[[], object], float, float]] = [  # with its FLOPs and bytes
        (lambda: torch.mm(a, b), 2 * n**3, 3 * 4 * n**2),
        (lambda: torch.mm(c, d), 2 * large**3, 3 * 4 * large**2),
        (lambda: torch.add(x, y, out=z), long, 3 * 4 * long),
        (lambda: z.copy_(x), 0, 2 * 4 * long),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a core that is taken would be measured, not the machine
    rounds = [[_seconds(function) for function, _, _ in work] for _ in range(15)][1:]  # the first warms up
    torch.set_num_threads(threads)
    times = list(zip(*rounds, strict=True))
    peak_flops = max(flops / min(taken) for (_, flops, _), taken in zip(work, times, strict=True))
    peak_bytes = max(moved / min(taken) for (_, _, moved), taken in zip(work, times, strict=True))
    bounds = [roofline(flops, moved, peak_flops=peak_flops, peak_bytes=peak_bytes) for _, flops, moved in work]
    return min(times[0]) / bounds[0], min(times[2]) / bounds[2]


@measure("best time of a product, 512 x 512, over its roofline by one core's own peaks; at least 1, and near it")
def matmul_over_bound(_seed: int) -> float:
    return _over_roofline()[0]


@measure("the same of adding two vectors of 8 MB, which is bound by memory; at least 1, and below 2")
def addition_over_bound(_seed: int) -> float:
    return _over_roofline()[1]
